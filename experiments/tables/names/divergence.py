"""The comparison with the dense model as readers know it: a column for each measure and text."""

from __future__ import annotations

import re

NAMES = {"kl": "KL", "agreement": "Top-1 agreement", "acceptance": "Acceptance"}
SHORT_NAMES = {"kl": "KL", "agreement": "Agree.", "acceptance": "Accept."}
COLUMN = re.compile(rf"({'|'.join(NAMES)})_(.+)")


def divergence_column(measure: str, text: str) -> str:
    """The name of the column of a measure on a text: `kl_wikitext2`."""
    return f"{measure}_{text}"


def measure_and_text(column: str) -> tuple[str, str] | None:
    """What a column shows, if it is one of these."""
    found = COLUMN.fullmatch(column)
    return (found[1], found[2]) if found else None
