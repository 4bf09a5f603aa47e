"""When the command started and for which study: what names its sweep, the same on every rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

from camera.runtime import distributed

_name: str | None = None


def started() -> str:
    """The name; a process that isn't of the command has the time of asking."""
    return _name or _now()


def start(arguments: Sequence[str] = ()) -> None:
    """Take the time, rank 0's where there are several; every rank calls it.

    The name goes on with what the arguments ask for: the preset, else the keys that they sweep.
    """
    global _name
    _name = "-".join([_now(), *_asked(arguments)])
    if distributed.world() > 1:
        from torch import distributed as group

        told = [_name]
        group.broadcast_object_list(told, src=0)
        _name = told[0]


def _asked(arguments: Sequence[str]) -> list[str]:
    given = dict(a.lstrip("+").split("=", 1) for a in arguments if "=" in a)
    preset = given.get("experiment", "null")
    if preset != "null":
        return re.findall(r"\w+", preset)
    several = [key for key, value in given.items() if "," in value and value[0] not in "[{"]
    return [key.split(".")[-1] for key in several if not key.startswith("hydra.")]


def _now() -> str:
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")
