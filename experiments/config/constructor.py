"""A class named by `_target_` in a YAML: its constructor is its schema, and builds it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import field, make_dataclass
from enum import Enum, StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING


@cache
def choice(*options: str) -> type[StrEnum]:
    """The type of "one of these", which OmegaConf lists when it refuses another value.

    The same options give the same type, so that a value can be interpolated into another key.
    """
    return StrEnum("Choice", {option: option for option in options})


def locate(target: str) -> type:
    """The class of a dotted name; ImportError where there is none."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ValueError) as error:
        raise ImportError(f"no class {target}") from error


def typed_settings(target: str) -> type | dict:
    """A dataclass whose fields are the constructor's parameters, for OmegaConf to check against.

    Types that OmegaConf doesn't know are left unchecked; the class checks its own values. A class
    that can't be imported (an extra that isn't installed) goes unchecked until it is built.
    """
    try:
        cls = locate(target)
    except ImportError:
        return {}
    hints = _hints(cls)
    known = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    factories = {f.name: f.default_factory for f in known}
    fields: list[tuple] = [("_target_", str, field(default=target))]
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = _default(parameter, factories.get(name, dataclasses.MISSING))
        fields.append((name, _checked_type(hints.get(name, Any)), default))
    return make_dataclass(cls.__name__, fields)


def build(settings: dict[str, Any]) -> Any:
    """The object that a resolved group describes; the class's own errors pass through."""
    arguments = {key: value for key, value in settings.items() if key != "_target_"}
    return locate(settings["_target_"])(**arguments)


def _hints(cls: type) -> dict[str, Any]:
    """Types of the constructor's parameters, where a field is named by a base class in its module.

    A type that its module imports for type checkers alone is left open.
    """
    if not dataclasses.is_dataclass(cls):
        return typing.get_type_hints(cls.__init__)
    return {
        name: _evaluated(hint, vars(sys.modules[base.__module__]))
        for base in reversed(cls.__mro__)
        for name, hint in inspect.get_annotations(base).items()
    }


def _evaluated(hint: Any, names: dict[str, Any]) -> Any:
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except NameError:
        return Any


def _default(parameter: inspect.Parameter, factory: Any) -> Any:
    value = MISSING if parameter.default is parameter.empty else parameter.default
    if factory is not dataclasses.MISSING:
        value = factory()
    value = str(value) if isinstance(value, Path) else value
    if isinstance(value, list | tuple | dict):
        return field(default_factory=lambda: list(value) if isinstance(value, tuple) else value)
    return field(default=value)


def _checked_type(hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return choice(*arguments) if all(isinstance(a, str) for a in arguments) else Any
    if origin in (typing.Union, types.UnionType):
        some = [a for a in arguments if a is not types.NoneType]
        inner = _checked_type(some[0]) if len(some) == 1 else Any
        return inner if len(some) == len(arguments) or inner is Any else inner | None
    if origin in (list, tuple, Sequence) and arguments:
        inner = _checked_type(arguments[0])
        return list[inner]  # type: ignore[valid-type]
    if hint is Path:
        return str
    plain = isinstance(hint, type) and issubclass(hint, bool | int | float | str | Enum)
    return hint if plain else Any
