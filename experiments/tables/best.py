"""What came out best at each ratio, with all that can't be told from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.tables.cells import Column, cell
from experiments.tables.comparable import ComparableRuns, comparable_runs
from experiments.tables.names.datasets import dataset_label
from experiments.tables.names.methods import display_name, is_ranked
from experiments.tables.ranking import tied_with_best
from experiments.tables.rows import perplexity_columns


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

    Those behind it differ from it by no more than one standard error (`ranking.is_tied`).
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
