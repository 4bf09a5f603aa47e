"""What came out best, with all that can't be told from it: in a column, and at each ratio."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from camera.calibration.corpora import CORPORA
from experiments.tables.comparable import ComparableRuns, comparable_runs
from experiments.tables.layouts.cells import Column, cell
from experiments.tables.names.datasets import dataset_label
from experiments.tables.names.methods import display_name, is_ranked
from experiments.tables.rows import perplexity_columns
from experiments.tables.rows.run import BLOCKS, QUESTIONS

Run = dict[str, Any]


@dataclass(frozen=True)
class Leader:
    """One of the best of a ratio: method by its display name, settings, score and its error.

    `size` is that of the weights as a share of the dense model's.
    """

    method: str
    settings: str
    score: float
    error: float | None  # standard error of the score
    size: float | None


@dataclass(frozen=True)
class Best:
    """The best methods of one ratio by `measure`, the very best first.

    Those behind it differ from it by no more than one standard error (`is_tied`).
    `distinguished` says whether any method is behind them: else nothing is better than another.
    """

    ratio: str
    measure: str
    higher_is_better: bool
    leaders: list[Leader]
    distinguished: bool
    dense: float | None  # the dense model's score


def best_at_each_ratio(means: pd.DataFrame) -> Iterator[tuple[ComparableRuns, list[Best]]]:
    """Of the rows of `over_seeds`, block by block, the best of each ratio.

    By the average of the tasks, else by the first perplexity. A ratio with a single method isn't
    told, nor a block without any; floors and the dense model compete for nothing.
    """
    done = means[means["n"] > 0] if len(means) else means
    for block in comparable_runs(done):
        if found := list(_bests(block)):
            yield block, found


def _bests(block: ComparableRuns) -> Iterator[Best]:
    dense = {} if block.dense is None else block.dense.to_dict()
    texts = perplexity_columns(block.runs)
    for group in block.groups():
        rivals = group[group["method"].map(is_ranked)]
        known = [score for score in ("average", *texts) if rivals[score].notna().any()]
        if not known:
            continue
        runs = rivals[rivals[known[0]].notna()].to_dict("records")
        if len({run["method"] for run in runs}) > 1:
            yield _best(runs, dense, known[0], block.data)


def _best(runs: list[dict[str, Any]], dense: dict[str, Any], score: str, data: str) -> Best:
    higher = score == "average"
    sign = -1 if higher else 1
    leaders = [runs[place] for place in tied_with_best(runs, score, sign)]
    leaders.sort(key=lambda run: sign * run[score])
    return Best(
        ratio=cell(Column("ratio"), runs[0]).text,
        measure=score if higher else f"perplexity of {dataset_label(score, data)}",
        higher_is_better=higher,
        leaders=[_leader(run, dense, score) for run in leaders],
        distinguished=len(leaders) < len(runs),
        dense=_number(dense, score),
    )


def _leader(run: dict[str, Any], dense: dict[str, Any], score: str) -> Leader:
    full = _number(dense, "size_mb")
    return Leader(
        method=display_name(run["method"]),
        settings=run["settings"],
        score=run[score],
        error=_number(run, f"{score}_se"),
        size=run["size_mb"] / full if full else None,
    )


def _number(run: dict[str, Any], key: str) -> float | None:
    value = run.get(key)
    return None if value is None or pd.isna(value) else float(value)


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

    Of perplexities and comparisons with the dense model it is that of their difference on the same
    blocks: with d_b the difference of the mean nll of block b (or of what is compared), √(Σ (d_b -
    d̄)² / (B - 1) / B), against the difference of the log perplexities. Of a task it is that of the
    difference on the same questions, of an average of T tasks √(Σ error²) / T of these. Where runs
    of before don't tell single answers, it is the standard error of the best score. Spreads s over
    n seeds of either add s² / n. Where nothing of this is known, only equal digits tie.
    """
    a, b = best[score], other[score]
    if best is other or cell(Column(score), best).text == cell(Column(score), other).text:
        return True
    paired = paired_error(best, other, score)
    spread = math.hypot(_of_seeds(best, score), _of_seeds(other, score))
    if paired is not None and score not in CORPORA:
        return abs(a - b) <= math.hypot(paired, spread)
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


def paired_error(best: Run, other: Run, score: str) -> float | None:
    """Standard error of the difference of two rows that measured the same, in the score's unit."""
    one, two = (run.get(QUESTIONS) or {} for run in (best, other))
    if tasks := [task for task in one | two if score in (task, "average")]:
        errors = [_error_of_difference(one.get(task), two.get(task)) for task in tasks]
        return None if None in errors else 100 * math.hypot(*errors) / len(errors)
    one, two = ((run.get(BLOCKS) or {}).get(score) for run in (best, other))
    error = _error_of_difference(one, two)
    unit = 100 if score.startswith(("agreement_", "acceptance_")) else 1
    return None if error is None else unit * error


def _error_of_difference(one: Sequence[float] | None, two: Sequence[float] | None) -> float | None:
    """√(Σ (d - d̄)² / (n - 1) / n) of the differences d of n pairs; None where they are no pairs."""
    if one is None or two is None or len(one) != len(two) or len(one) < 2:
        return None
    return float(np.std(np.subtract(one, two, dtype=float), ddof=1) / math.sqrt(len(one)))
