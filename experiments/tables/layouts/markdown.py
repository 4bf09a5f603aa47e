"""A page of tables in Markdown."""

from __future__ import annotations

from experiments.tables.layouts.cells import Cell
from experiments.tables.pages import Page, Table


def to_markdown(page: Page) -> str:
    """GitHub tables, numbers to the right, each below its title and caption."""
    parts = [f"{_title(table)}\n\n{_rows(table)}" for table in page.tables]
    notes = "".join(f"- {_escaped(note)}\n" for note in page.notes)
    return "\n".join([*parts, notes] if notes else parts)


def _title(table: Table) -> str:
    caption = f"\n\n{_escaped(table.caption)}" if table.caption else ""
    return f"**{_escaped(table.title)}**{caption}"


def _rows(table: Table) -> str:
    dashes = ["---" if column.is_text else "---:" for column in table.columns]
    lines = [[_escaped(column.header) for column in table.columns], dashes]
    lines += [[_cell(cell) for cell in row] for group in table.shown() for row in group]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    text = {1: f"**{text}**", 2: f"<ins>{text}</ins>"}.get(cell.place, text)
    return text + cell.behind


def _escaped(text: str) -> str:
    return _one_line(text).replace("|", "\\|").replace("<", "&lt;")


def _one_line(text: str) -> str:
    return " ".join(text.split())
