"""Classes by name: those that registered, and those that packages announce."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import walk_packages
from typing import Any

from camera.runtime.errors import CameraError


class Registry(Mapping[str, type]):
    """A mapping from names to classes that imports what it needs when it is first asked.

    `what` and `key` name it in refusals. `packages` are those whose modules register classes when
    they are imported; `entry_points` is the group under which other distributions announce theirs
    (`name = "module:Class"`).
    """

    def __init__(
        self, what: str, key: str, packages: Sequence[str] = (), entry_points: str | None = None
    ):
        self._what, self._key = what, key
        self._packages, self._group = packages, entry_points
        self._classes: dict[str, type] = {}
        self._complete = False

    def register(self, name: str, cls: type) -> None:
        """Make a class known under a name."""
        self._classes[name] = cls

    def __getitem__(self, name: Any) -> type:
        if name not in self._classes:
            self._import_all()
        if name not in self._classes:
            near = difflib.get_close_matches(str(name).lower().replace("-", "_"), self._classes)
            hint = f"; did you mean {near[0]}" if near else ""
            raise CameraError(f"{self._key}={name} is none of {', '.join(sorted(self))}{hint}.")
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._classes:
            self._import_all()
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        self._import_all()
        return iter(self._classes)

    def __len__(self) -> int:
        self._import_all()
        return len(self._classes)

    def _import_all(self) -> None:
        if self._complete:
            return
        self._complete = True
        for name in self._packages:
            package = import_module(name)
            for found in walk_packages(package.__path__, f"{name}."):
                import_module(found.name)
        for point in entry_points(group=self._group) if self._group else ():
            self._classes.setdefault(point.name, point.load())
