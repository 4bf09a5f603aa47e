"""Launches, waits, copies and bytes, by the line of Python that asked for them."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One count: `kind` is launch, wait, h2d/d2h with pinned/pageable, peer, alloc or pin."""

    file: str
    line: int
    function: str
    kind: str
    operator: str
    times: int
    bytes: int


class Counts:
    """What was counted over a `with counting(...)` block."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.peak = self.peak_pinned = 0  # bytes, over the block
        self.peak_host = 0  # bytes that the block added to the host's tensors, the pinned ones too
        self._held: dict[tuple[str, int, str], int] = {}

    def times(self, kind: str, where: str = "") -> int:
        """How often: kinds that begin with `kind`, lines whose file or function has `where`."""
        return sum(row.times for row in self._of(kind, where))

    def bytes(self, kind: str, where: str = "") -> int:
        """How many bytes, by the same rule."""
        return sum(row.bytes for row in self._of(kind, where))

    def _of(self, kind: str, where: str) -> Iterator[Row]:
        for row in self.rows:
            if row.kind.startswith(kind) and where in f"{row.file}:{row.line}:{row.function}":
                yield row

    def lines(self) -> dict[tuple[str, int, str], dict[str, tuple[int, int]]]:
        """(file, line, function) -> kind -> (times, bytes)."""
        found: dict = defaultdict(lambda: defaultdict(lambda: (0, 0)))
        for row in self.rows:
            times, size = found[row[:3]][row.kind]
            found[row[:3]][row.kind] = (times + row.times, size + row.bytes)
        return {line: dict(kinds) for line, kinds in found.items()}

    def on_host(self, root: str | Path = "") -> str:
        """The lines whose tensors the host held at its peak, largest first."""
        rows = sorted(self._held.items(), key=lambda row: -row[1])
        return "\n".join(
            f"{size / 1e6:8.2f} MB  {_short(file, root)}:{line} {function}"
            for (file, line, function), size in rows
            if size > 0
        )

    def table(self, by: str = "launch", most: int = 20, root: str | Path = "") -> str:
        """The lines with most of `by` (launch, wait, h2d, d2h, alloc), largest first."""
        head = ("line", "launches", "waits", "h2d", "h2d MB", "d2h", "d2h MB", "alloc MB")
        lines = []
        for (file, line, function), kinds in self.lines().items():

            def total(kind: str, what: int, kinds: dict = kinds) -> int:
                return sum(v[what] for k, v in kinds.items() if k.startswith(kind))

            place = f"{_short(file, root)}:{line} {function}" if line else file
            cells = (
                place,
                total("launch", 0),
                total("wait", 0),
                total("h2d", 0),
                total("h2d", 1) / 1e6,
                total("d2h", 0),
                total("d2h", 1) / 1e6,
                total("alloc", 1) / 1e6,
            )
            lines.append((total(by, 1 if by in ("h2d", "d2h", "alloc") else 0), cells))
        lines.sort(key=lambda pair: -pair[0])
        shown = [cells for _, cells in lines[:most]]
        sums = ("all", *(sum(cells[i] for _, cells in lines) for i in range(1, len(head))))
        body = [[_cell(value) for value in cells] for cells in (head, *shown, sums)]
        widths = [max(len(cells[i]) for cells in body) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w)
                for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            for cells in body
        )


@contextmanager
def counting(*project: str | Path) -> Iterator[Counts]:
    """Count what a block does. Lines are those of files below the `project` folders (all files
    without one): the innermost such line that led to an operator is the one it is counted for."""
    from tests.fake_device import core

    core().project([str(folder) for folder in project] or [""])
    core().reset()
    core().reset_peak(core().current_device())
    was, traced = core().count(True), core().trace(True)
    found, before = Counts(), core().host()[0]
    try:
        yield found
    finally:
        core().count(was)
        core().trace(traced)
        found.rows = [Row(*row) for row in core().report()]
        found.peak, found.peak_pinned = (
            core().memory(core().current_device())[1],
            core().pinned()[1],
        )
        found.peak_host = core().host()[1] - before
        found._held = {(file, line, name): size for file, line, name, size in core().host_at_peak()}


def _short(file: str, root: str | Path) -> str:
    return file.removeprefix(str(root)).lstrip("/") if root else file


def _cell(value: object) -> str:
    return (
        f"{value:,.2f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
