"""Settings as a caller gives them: numbers of any library, other types refused, old names told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from camera.runtime.errors import CameraError

KEYS: dict[str, dict[str, str]] = {  # group: old key -> new key
    "method": {
        "term": "score",
        "score_by": "score",
        "norm": "score",
        "gate": "routing_weights",
        "errors": "token_weights",
        "percdamp": "damping",
        "limit": "max_subsets",
        "tokens": "sample_tokens",
        "loss_of": "loss_norm",
    },
    "evaluation": {"unpack": "dequantize"},
}
VALUES: dict[str, dict[str, dict[str, str]]] = {  # group: new key -> old value -> new value
    "method": {
        "score": {"joint": "fisher", "relative": "hidden_share", "sum": "weight_sum"},
        "rank_scope": {"model": "global"},
        "token_weights": {"absolute": "uniform"},
    },
    "memory": {"experts": {"layer": "ram", "visit": "disk"}},
}
OF_KEY = {("norm", "product"): "weight_product"}  # where another method's old value stays valid

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own; anything else as it is."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    return value


def typed(hint: Any, value: Any, key: str) -> Any:
    """The value of setting `key` as its type hint wants it; CameraError for one of another type.

    Choices (`Literal`) and ranges are checked by those who know them.
    """
    value = plain(value)
    if not _fits(hint, value):
        raise CameraError(f"{key}={value!r}: give {_name(hint)}.")
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


def seed_of(value: Any, key: str = "seed") -> int:
    """A seed; CameraError for anything but a whole number of at least 0.

    No seed at all would draw other text each time, and -1 draws the same as 1.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CameraError(f"{key}={value!r}: give a whole number of at least 0.")
    return value


def _fits(hint: Any, value: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in parts)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return listed and all(_fits(parts[0], plain(item)) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Literal or hint not in _NAMES:
        return True
    return isinstance(value, hint)


def _name(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_name(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(str, parts))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each {_name(parts[0])}"
    return _NAMES.get(hint, str(hint))


def refuse_unknown(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """CameraError for the first name that isn't known, with the nearest one and all others."""
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise CameraError(
                f"{what} has no argument {key}.{hint} The arguments are {', '.join(known)}."
            )


def renaming(group: str, key: str, value: Any = None) -> str | None:
    """The sentence that names the new key or value, None where neither was renamed.

    For a key that is refused, or a value of it: an old key may be a valid one of another method.
    """
    new_key = KEYS.get(group, {}).get(key, key)
    values = VALUES.get(group, {}).get(new_key, {})
    new_value = OF_KEY.get((key, str(value)), values.get(str(value)))
    if new_key == key and new_value is None:
        return None
    old, new = f"{group}.{key}", f"{group}.{new_key}"
    if new_value is not None:
        return f"{old}={value} is now {new}={new_value}."
    return f"{old} is now {new}."
