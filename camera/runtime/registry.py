"""Classes by name: those that registered, and those that packages announce."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint
from importlib.metadata import entry_points as installed_entry_points
from pkgutil import walk_packages
from typing import Any, TypeVar

from camera.runtime.errors import CameraError

T = TypeVar("T")


class Registry(Mapping[str, type[T]]):
    """A mapping from names to classes that imports what it needs when a name is first asked for.

    what: noun of an entry, and key: the setting that names it, both for error messages. packages:
    those whose modules register classes when they are imported, so that a new class is a new file.
    entry_points: the group under which other distributions announce theirs (name = "module:Class");
    these are loaded one by one, so that a broken one stops no other.
    """

    def __init__(
        self, what: str, key: str, packages: Sequence[str] = (), entry_points: str | None = None
    ):
        self.what, self.key = what, key
        self._packages, self._group = packages, entry_points
        self._classes: dict[str, type[T]] = {}
        self._announced: dict[str, EntryPoint] = {}
        self._complete = False

    def register(self, cls: type[T], name: str | None = None) -> type[T]:
        """Enter a class by its `name`; serves as a decorator."""
        self._classes[name or cls.name] = cls
        return cls

    def __getitem__(self, name: Any) -> type[T]:
        if name not in self:
            close = get_close_matches(str(name).lower().replace("-", "_"), list(self), n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise CameraError(f"{self.key}={name} is none of {', '.join(sorted(self))}.{hint}")
        if name not in self._classes:
            self._classes[name] = self._announced[name].load()
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        if name in self._classes:
            return True
        self._import_all()
        return name in self._classes or name in self._announced

    def __iter__(self) -> Iterator[str]:
        self._import_all()
        return iter(self._classes | self._announced)

    def __len__(self) -> int:
        self._import_all()
        return len(self._classes | self._announced)

    def _import_all(self) -> None:
        if self._complete:
            return
        self._complete = True  # before: the modules imported may ask for names themselves
        try:
            for name in self._packages:
                package = import_module(name)
                for found in walk_packages(package.__path__, f"{name}."):
                    import_module(found.name)
        except BaseException:
            self._complete = False
            raise
        for point in installed_entry_points(group=self._group) if self._group else ():
            self._announced[point.name] = point
