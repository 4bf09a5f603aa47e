"""Classes by name, imported when they are first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from camera.runtime.errors import CameraError

T = TypeVar("T")


class Registry(Mapping[str, type[T]]):
    """Classes that registered, that ship with the package, or that installed packages announce.

    what: noun of an entry, and key: the setting that names it, both for error messages. shipped:
    "module:Class" by name. entry_points: group of installed entry points. A registered class comes
    before a shipped one, a shipped one before an announced one. Iterating imports nothing.
    """

    def __init__(
        self,
        what: str,
        key: str,
        shipped: Mapping[str, str] | None = None,
        entry_points: str | None = None,
    ):
        self.what, self.key, self.group = what, key, entry_points
        self._shipped = dict(shipped or {})
        self._registered: dict[str, type[T]] = {}

    def register(self, cls: type[T]) -> type[T]:
        """Enter a class by its `name`; serves as a decorator."""
        self._registered[cls.name] = cls
        return cls

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._registered:
            self._registered[name] = self._load(name)
        return self._registered[name]

    def __contains__(self, name: object) -> bool:
        return name in self._registered or name in self._shipped or name in self._announced

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._shipped, *self._announced, *self._registered)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @cached_property
    def _announced(self) -> dict[str, EntryPoint]:
        found = entry_points(group=self.group) if self.group else ()
        return {entry.name: entry for entry in found}

    def _load(self, name: str) -> type[T]:
        if name in self._shipped:
            module, _, attribute = self._shipped[name].partition(":")
            return getattr(import_module(module), attribute)
        if name in self._announced:
            return self._announced[name].load()
        close = get_close_matches(str(name), list(self), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise CameraError(
            f"{self.key}={name} is no {self.what}: choose from {', '.join(sorted(self))}.{hint}"
        )
