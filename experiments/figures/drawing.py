"""A figure that can't be drawn is said in one sentence, and the others are drawn."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from experiments.records.failures import one_line

log = logging.getLogger("camera")


def drawn(draw: Callable[..., Path | None], *arguments: Any, file: Path) -> list[Path]:
    """The file, if `draw(*arguments, file)` wrote it; a figure never fails what it shows."""
    try:
        found = draw(*arguments, file)
    except Exception as error:  # a font, a backend, a full disk: it can be drawn again
        log.warning("The figure %s can't be drawn: %s", file.stem, one_line(error))
        plt.close("all")
        return []
    return [found] if found else []
