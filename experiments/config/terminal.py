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
    """Messages in lines as wide as the terminal, broken between words; whole in a file."""

    def format(self, record: logging.LogRecord) -> str:
        text, columns = super().format(record), width()
        if columns is None:
            return text
        lines = (line.expandtabs(2) for line in text.split("\n"))
        return "\n".join(_folded(line, columns) for line in lines)


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
