"""The best and the second of runs, each with those that can't be told from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from experiments.tables.cells import Column, cell
from experiments.tables.names.methods import is_ranked

Run = dict[str, Any]
BLOCKS = "_blocks"  # column of a run's mean nll of each block, by text


def places(runs: Sequence[Run], score: str, best: Literal["low", "high"] | None) -> list[int]:
    """For each row of `over_seeds` 1 if it is among the best of a score, 2 if among the second.

    Only methods have a place: neither the original nor floors, nor one method by itself. Whoever
    `is_tied` with the best shares its place, and of the others whoever is with the second. Where
    all are tied nobody has a place.
    """
    found = [0] * len(runs)
    left = [n for n, run in enumerate(runs) if is_ranked(run["method"]) and _known(run, score)]
    if best is None or len(left) < 2:
        return found
    sign = 1 if best == "low" else -1
    first = tied_with_best([runs[n] for n in left], score, sign)
    if len(first) == len(left):
        return found
    others = [n for place, n in enumerate(left) if place not in first]
    second = tied_with_best([runs[n] for n in others], score, sign)
    for n in first:
        found[left[n]] = 1
    for n in second:
        found[others[n]] = 2
    return found


def tied_with_best(runs: Sequence[Run], score: str, sign: int) -> list[int]:
    """The places of the best and of those tied with it; `sign` 1 where less is better, else -1."""
    best = min(runs, key=lambda run: sign * run[score])
    return [place for place, run in enumerate(runs) if is_tied(best, run, score)]


def is_tied(best: Run, other: Run, score: str) -> bool:
    """Whether two rows differ by no more than one standard error, or show the same digits.

    Of perplexities it is the error of their difference on the same blocks: with d_b the difference
    of the mean nll of block b, √(Σ (d_b - d̄)² / (B - 1) / B), against the difference of the log
    perplexities. Of a task, or an average, it is the standard error of the best score, as the
    answers to single questions aren't kept. Spreads s over n seeds of either add s² / n. Where
    nothing of this is known, only equal digits tie.
    """
    a, b = best[score], other[score]
    if best is other or cell(Column(score), best).text == cell(Column(score), other).text:
        return True
    paired = _paired_error(best, other, score)
    spread = math.hypot(_of_seeds(best, score), _of_seeds(other, score))
    if paired is not None:
        return abs(math.log(a) - math.log(b)) <= math.hypot(paired, spread / min(a, b))
    error = best.get(f"{score}_se")
    known = 0.0 if error is None or pd.isna(error) else error
    return abs(a - b) <= math.hypot(known, spread)


def _known(run: Run, score: str) -> bool:
    return run.get(score) is not None and not pd.isna(run[score])


def _of_seeds(run: Run, score: str) -> float:
    spread, n = run.get(f"{score}_std"), run.get("n") or 1
    return 0.0 if spread is None or pd.isna(spread) else spread / math.sqrt(n)


def _paired_error(best: Run, other: Run, score: str) -> float | None:
    one, two = ((run.get(BLOCKS) or {}).get(score) for run in (best, other))
    if not one or not two or len(one) != len(two) or len(one) < 2:
        return None
    return float(np.std(np.subtract(one, two), ddof=1) / math.sqrt(len(one)))
