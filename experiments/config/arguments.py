"""The command line before Hydra reads it: a name stays the text that was typed.

Hydra's grammar makes 202406 of `2024_06` and can't read `模型`; for keys whose values are text the
first is quoted here, the second refused with the quoted argument to copy.
"""

from __future__ import annotations

import shlex
import types
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException

from camera.runtime.errors import CameraError
from experiments.config.schema import Config, group_types

TEXT, NULLABLE_TEXT, TEXTS, LIST = "text", "text or null", "texts", "list"
UNSAFE = set('"$`\\!')  # between double quotes, in a shell


def as_typed(arguments: Sequence[str]) -> list[str]:
    """The arguments with quotes where Hydra would make another text of a name.

    Raises CameraError, with the argument to write, for a text that its grammar can't read and for
    one value where a list is needed.
    """
    return [_as_typed(argument) for argument in arguments]


def _as_typed(argument: str) -> str:
    key, equals, typed = argument.partition("=")
    kind = _kinds().get(key.lstrip("+"))
    if not equals or kind is None:
        return argument
    value = parsed(argument)
    if value is UNREADABLE or (kind in (TEXT, NULLABLE_TEXT) and isinstance(value, list | dict)):
        raise CameraError(
            f"{argument}: {key} can't be read without quotes: write {_for_shell(_quoted(argument))}"
        )
    if kind in (TEXTS, LIST):
        if _is_bare(value):
            raise CameraError(
                f"{argument}: {key} is a list: write {_for_shell(f'{key}=[{typed}]')}"
            )
        if kind == LIST or not isinstance(value, list):
            return argument
        inside = _each_as_typed(typed.strip()[1:-1], value, NULLABLE_TEXT)
        return f"{key}=[{inside}]"
    simple = isinstance(value, ChoiceSweep) and value.simple_form
    return f"{key}={_each_as_typed(typed, value.list if simple else [value], kind)}"


def _each_as_typed(typed: str, values: Sequence[Any], kind: str) -> str:
    """The text with those of its parts in quotes whose value is no text."""
    parts = typed.split(",") if len(values) > 1 else [typed]
    if len(parts) != len(values):  # a comma within quotes: they are there already
        return typed
    return ",".join(
        _in_quotes(part) if _reads_otherwise(part, value, kind) else part
        for part, value in zip(parts, values, strict=True)
    )


def _reads_otherwise(part: str, value: Any, kind: str) -> bool:
    if value is None:
        return kind == TEXT
    return isinstance(value, bool | int | float) and str(value) != part


def _is_bare(value: Any) -> bool:
    """Whether it is one text, or a sweep over such, but no reference to another key."""
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return all(isinstance(each, str) and "${" not in each for each in map(_text, values))


def _text(value: Any) -> Any:
    return getattr(value, "text", value)  # of a text in quotes


UNREADABLE = object()


def parsed(argument: str) -> Any:
    """What Hydra makes of the value of an argument; UNREADABLE where its grammar refuses."""
    try:
        return OverridesParser.create().parse_override(argument)._value
    except HydraException:
        return UNREADABLE


def _quoted(argument: str) -> str:
    """The argument with quotes around what needs them: parts of a sweep, or all of it."""
    key, _, typed = argument.partition("=")
    parts = typed.split(",")
    each = [p if parsed(f"{key}={p}") is not UNREADABLE else _in_quotes(p) for p in parts]
    mended = f"{key}={','.join(each)}"
    whole = len(parts) == 1 or parsed(mended) is UNREADABLE or mended == argument
    return f"{key}={_in_quotes(typed)}" if whole else mended


def _in_quotes(text: str) -> str:
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def _for_shell(argument: str) -> str:
    return shlex.quote(argument) if set(argument) & UNSAFE else f'"{argument}"'


@cache
def _kinds() -> dict[str, str]:
    """The keys whose values are texts or lists, by their dotted names."""
    found = dict(_of_class(Config, ""))
    for group, classes in group_types().items():
        for cls in classes.values():
            found |= _of_class(cls, f"{group}.")
    return found


def _of_class(cls: type, prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if is_dataclass(hint):
            found |= _of_class(hint, f"{prefix}{name}.")
        elif name != "_target_" and (kind := _kind(hint)):
            found[f"{prefix}{name}"] = kind
    return found


def _kind(hint: Any) -> str | None:
    if hint is str:
        return TEXT
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return TEXTS if arguments == (str,) else LIST
    if origin in (typing.Union, types.UnionType) and set(arguments) == {str, type(None)}:
        return NULLABLE_TEXT
    return None
