"""Names on the command line that don't exist, told with the nearest that do, before Hydra reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from typing import get_type_hints

from camera.runtime.errors import CameraError
from camera.runtime.values import renaming
from experiments.config.location import CONF
from experiments.config.schema import Config, group_types

SIMPLE = re.compile(r"[\w.-]+(,[\w.-]+)*")
HYDRA = ("hydra.", "hydra/", "+", "~", "-")  # its own, and what it is asked to add or delete
ELSEWHERE = ("hydra.searchpath", "--config-dir", "-cd", "--config-path", "-cp")
PLAIN = ("-m", "--multirun", "-r", "--run", "--resolve")  # options without a value
OWN_PATH = {"model": "path", "calibration": "source"}
ABSENT = ("null", "none", "")
TARGET = "_target_"  # Hydra's: a class of one's own in place of the one of the YAML


def check_spelling(arguments: Sequence[str]) -> None:
    """CameraError for a setting or a choice that nothing is called, with the nearest names.

    Where other folders are searched for choices, all is left to Hydra.
    """
    if any(argument.startswith(ELSEWHERE) for argument in arguments):
        return
    for before, argument in pairwise(["", *arguments]):
        key, equals, value = argument.partition("=")
        if key.startswith(HYDRA) or (before.startswith("-") and before not in PLAIN):
            continue  # or the value of an option of Hydra's
        if not equals:
            raise CameraError(_without_value(argument))
        if (CONF / key).is_dir():
            _check_choices(key, value)
            continue
        group, _, name = key.rpartition(".")
        known = _of_chosen(group, arguments)
        known = _keys().get(group) if known is None else known
        if known is None and "." not in group:
            raise CameraError(_unknown(f"{key} is no setting", key, _keys()[""]))
        if known is None or name in known or renaming(group, name):
            continue
        if name == TARGET and group in group_types():
            continue
        if not known:
            chosen = next(a for a in arguments if a.startswith(f"{group}="))
            raise CameraError(f"{chosen} has no settings of its own: leave {key} out.")
        prefix = f"{group}." if group else ""
        elsewhere = [] if group else _grouped(name, arguments)
        raise CameraError(
            _unknown(f"{key} is no setting", key, [prefix + k for k in known], elsewhere)
        )


def _of_chosen(group: str, arguments: Sequence[str]) -> set[str] | None:
    """The settings of the choices of a group that are named; None where they aren't all known."""
    known = group_types().get(group, {})
    chosen = [a.partition("=")[2] for a in arguments if a.startswith(f"{group}=")]
    names = chosen[-1].split(",") if chosen else []
    if not names or not {*names} <= {*known}:
        return None
    return set.union(*(_names(known[name]) for name in names)) - {TARGET}


def _grouped(name: str, arguments: Sequence[str]) -> list[str]:
    """A setting of this name in every group that has one, by the choices that are named."""
    groups = {group: _of_chosen(group, arguments) or known for group, known in _keys().items()}
    return [f"{group}.{name}" for group, known in groups.items() if group and name in known]


def _without_value(argument: str) -> str:
    if argument in _keys()[""] or argument in _keys() or (CONF / argument).is_dir():
        return f"{argument} has no value: write {argument}=VALUE, without spaces."
    return (
        f"'{argument}' is no setting: write SETTING=VALUE, without spaces; `camera --help` lists "
        "the other commands."
    )


def _check_choices(group: str, value: str) -> None:
    known = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    if group == "experiment" and "," in value and value[0] not in "[{'\"":
        raise CameraError(f"experiment={value}: for several presets write experiment=[{value}].")
    if "/" in value and group in OWN_PATH and ":" not in value:
        raise CameraError(
            f"{group}={value} is no choice: a path is set by {group}.{OWN_PATH[group]}={value}."
        )
    for name in value.split(",") if SIMPLE.fullmatch(value) else ():
        if name not in (*known, *ABSENT):
            raise CameraError(_unknown(f"{group}={name} is no choice", name, known))


def _unknown(what: str, name: str, known: Iterable[str], near: Sequence[str] = ()) -> str:
    known = sorted(known)
    near = near or get_close_matches(name, known, n=3)
    if near:
        return f"{what}; did you mean {' or '.join(near)}? --help has all."
    return f"{what}; there are {', '.join(known)}."


@cache
def _keys() -> dict[str, set[str]]:
    """The settings by their group; of a group whose choices differ, those of any of them."""
    hints = get_type_hints(Config)
    found = {"": {"experiment", *hints}}
    found |= {name: _names(hint) for name, hint in hints.items() if is_dataclass(hint)}
    for group, classes in group_types().items():
        found[group] = set.union(*map(_names, classes.values())) - {TARGET}
    return found


def _names(cls: type) -> set[str]:
    return {field.name for field in fields(cls)}
