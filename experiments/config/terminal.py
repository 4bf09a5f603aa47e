"""Lines of a log as a terminal shows them."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap

INDENT = "    "  # of what a message goes on with


def width() -> int | None:
    """Columns of the terminal, or COLUMNS where it is set; None where nothing bounds a line."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    return None


class FoldedFormatter(logging.Formatter):
    """Messages as `folded` has them."""

    def format(self, record: logging.LogRecord) -> str:
        return folded(super().format(record))


def folded(text: str) -> str:
    """The text in lines as wide as the terminal, broken between words; as it is in a file."""
    columns = width()
    if columns is None:
        return text
    return "\n".join(_folded(line.expandtabs(2), columns) for line in text.split("\n"))


def _folded(line: str, columns: int) -> str:
    if len(line) <= columns:
        return line
    return textwrap.fill(
        line,
        max(columns, len(INDENT) + 1),
        subsequent_indent=INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
