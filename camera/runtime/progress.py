"""Progress display: bars on a terminal, lines in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING

import rich
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from camera.runtime.device.peak_memory import PeakMemory

LINE_EVERY = 60.0  # seconds between the lines of a log

_reached: str | None = None  # where the loop that is being done is

log = logging.getLogger("camera")

EachLayer = Callable[[str, int], Iterable[int]]
"""each_layer(title, start): the layers from `start` on, telling how far it is."""


Advance = Callable[[int], None]
"""advance(n): n more are done."""


def each_layer(start: int, count: int, title: str, memory: PeakMemory, show: bool) -> Iterator[int]:
    """Iterate over the layers from `start` on and show how far it is, time left and memory."""

    def held() -> str:
        return f"{memory.now() / 1e9:.2f} GB"

    if show and 0 < start < count:
        log.info("Going on at %s.", _place(title, count, "layers", start))
    with progress_bar(title, count, "layers", done=start, show=show, note=held) as advance:
        for index in range(start, count):
            yield index
            advance(1)


def reached() -> str | None:
    """Where a loop is, or was when it was broken off: "layer 3 of 6 (compress)"."""
    return _reached


@contextmanager
def progress_bar(
    title: str,
    total: int,
    unit: str,
    *,
    done: int = 0,
    show: bool = True,
    note: Callable[[], str] = str,
) -> Iterator[Advance]:
    """How far a loop is and the time it will take, with a `note` of the moment.

    A bar on a terminal, or in a notebook that has ipywidgets. Elsewhere lines in the log, so that a
    job in a queue says where it is: at most one in LINE_EVERY seconds, and one at the end of what
    took that long.
    """
    global _reached
    with _display(title, total, unit, done, show, note) as show_more:
        _reached = _place(title, total, unit, done)

        def advance(more: int) -> None:
            global _reached
            nonlocal done
            done += more
            _reached = _place(title, total, unit, done)
            show_more(more)

        yield advance
        _reached = None  # one that is broken off is told


def _place(title: str, total: int, unit: str, done: int) -> str:
    return f"{unit.removesuffix('s')} {min(done + 1, total)} of {total} ({title})"


@contextmanager
def _display(
    title: str, total: int, unit: str, done: int, show: bool, note: Callable[[], str]
) -> Iterator[Advance]:
    console = rich.get_console()
    if not show:
        yield lambda _: None
    elif console.is_interactive or (console.is_jupyter and find_spec("ipywidgets")):
        with _bar(console, title, total, unit, done, note) as advance:
            yield advance
    else:
        yield _lines(title, total, unit, done, note)


@contextmanager
def _bar(
    console: Console, title: str, total: int, unit: str, done: int, note: Callable[[], str]
) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),  # all fits a terminal of 80 columns
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=done, note=note())
        yield lambda more: progress.update(task, advance=more, note=note())


def _lines(title: str, total: int, unit: str, done: int, note: Callable[[], str]) -> Advance:
    began = told = time.monotonic()
    before = done  # by an earlier process: says nothing of this one's speed

    def advance(more: int) -> None:
        nonlocal done, told
        done, now = done + more, time.monotonic()
        over = done >= total
        if now - (began if over else told) < LINE_EVERY:
            return
        told, took = now, now - began
        left = "" if over else f"{_clock(took / (done - before) * (total - done))} left"
        said = [f"{title}: {done} of {total} {unit}", _clock(took), left, note()]
        log.info(", ".join(filter(None, said)))

    return advance


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def format_bytes(size: int) -> str:
    """A number of bytes for people, in a unit that shows two digits of it or more."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= unit / 10:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"
