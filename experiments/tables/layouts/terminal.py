"""Tables on the terminal, as wide as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import rich.box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from experiments.config.terminal import width
from experiments.tables.layouts.cells import Cell, Column
from experiments.tables.pages import Page, Row, Table

NAMED = ("ratio", "method", "settings")  # columns that every part of a folded table repeats
LONG, SETTINGS = 8, 32  # characters of a header, and of settings, beyond which they take two lines


def print_page(page: Page) -> None:
    """Print it; where a table is wider than the terminal, in several parts of all its rows.

    Errors behind scores are left out if the table fits without them. No cell is ever cut: into a
    file, unless COLUMNS is set, or where a single column is too wide, lines are as long as they
    are.
    """
    terminal = Console()
    for table in page.tables:
        for part in _parts(terminal, table):
            grid = _grid(part)
            Console(width=max(terminal.width, _width(terminal, grid))).print(grid)
            terminal.print()
    for note in page.notes:
        terminal.print(Text(note), style="dim")


def _parts(terminal: Console, table: Table) -> Iterator[Table]:
    """The table, or what of its columns fits side by side, in their order."""

    def fits(part: Table) -> bool:
        return width() is None or _width(terminal, _grid(part)) <= terminal.width

    for whole in (table, _without_errors(table)):
        if fits(whole):
            yield whole
            return
    named = [n for n, column in enumerate(table.columns) if column.name in NAMED]
    others = [n for n, column in enumerate(table.columns) if column.name not in NAMED]
    for number in range(2, len(others) + 1):
        size = -(-len(others) // number)
        starts = range(0, len(others), size)
        parts = [_columns(table, [*named, *others[start : start + size]]) for start in starts]
        if all(map(fits, parts)):
            break
    first, *more = parts
    yield first
    yield from (replace(p, title=f"{table.title} (continued)", caption="") for p in more)


def _columns(table: Table, places: list[int]) -> Table:
    groups = [
        [replace(row, cells=[row.cells[n] for n in places]) for row in group]
        for group in table.groups
    ]
    return replace(table, columns=[table.columns[n] for n in places], groups=groups)


def _without_errors(table: Table) -> Table:
    def bare(row: Row) -> Row:
        return replace(row, cells=[replace(cell, error="") for cell in row.cells])

    return replace(table, groups=[[bare(row) for row in group] for group in table.groups])


def _grid(table: Table) -> Grid:
    grid = Grid(
        title=Text(table.title),
        title_justify="left",
        caption=Text(table.caption) if table.caption else None,
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        padding=(0, 1),
        header_style="bold",
    )
    for column in table.columns:
        is_long = column.name == "settings"
        grid.add_column(
            Text(_header(column)),
            justify="left" if column.is_text else "right",
            no_wrap=not is_long,
            max_width=SETTINGS if is_long else None,
        )
    for group in table.shown():
        for row in group:
            grid.add_row(*map(_cell, row))
        grid.add_section()
    return grid


def _header(column: Column) -> str:
    """In two lines where it is long: between words, behind the name of its data."""
    text = column.header
    if len(text) <= LONG or column.is_text:
        return text
    for between in (" ", "-", "/"):
        first, found, rest = text.partition(between)
        if found:
            return f"{first}{found.strip()}\n{rest}"
    return text


def _cell(cell: Cell) -> Text:
    text = Text(cell.text, style={1: "bold", 2: "underline"}.get(cell.place, ""))
    return Text.assemble(text, cell.behind)


def _width(console: Console, grid: Grid) -> int:
    return console.measure(grid, options=console.options.update(width=10_000)).maximum
