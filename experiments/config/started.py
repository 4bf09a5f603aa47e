"""When the command started: what names its sweep, the same on every rank of a torchrun."""

from __future__ import annotations

from datetime import datetime

from camera.runtime import distributed

_name: str | None = None


def started() -> str:
    """The name; a process that isn't of the command has the time of asking."""
    return _name or _now()


def start() -> None:
    """Take the time, rank 0's where there are several; every rank calls it."""
    global _name
    _name = _now()
    if distributed.world() > 1:
        from torch import distributed as group

        told = [_name]
        group.broadcast_object_list(told, src=0)
        _name = told[0]


def _now() -> str:
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")
