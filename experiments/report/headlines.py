"""The report's first lines: what came out best at each ratio."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.tables.comparable import ComparableRuns, comparable_runs
from experiments.tables.rows import perplexity_columns


@dataclass(frozen=True)
class Best:
    """The best of one ratio by `measure`, which is `score` against the dense model's `dense`."""

    ratio: str
    method: str
    settings: str
    measure: str
    score: float
    dense: float | None
    size: float | None  # of the weights, as a share of the dense model's


@dataclass(frozen=True)
class Headline:
    """The best of each ratio of one block of comparable runs."""

    title: str
    bests: list[Best]


def headlines(means: pd.DataFrame) -> list[Headline]:
    """Of the finished rows of `over_seeds`: by the average of the tasks, else by perplexity."""
    done = means[means["n"] > 0]
    found = (Headline(block.title, list(_bests(block))) for block in comparable_runs(done))
    return [headline for headline in found if headline.bests]


def _bests(block: ComparableRuns) -> Iterator[Best]:
    dense = {} if block.dense is None else block.dense.to_dict()
    for group in block.groups():
        group = group[group["method"] != "dense"]
        measure, ascending = _measure(group)
        if measure:
            scored = group[group[measure].notna()]
            best = scored.sort_values(measure, ascending=ascending).iloc[0].to_dict()
            yield _best(best, dense, measure)


def _measure(group: pd.DataFrame) -> tuple[str | None, bool]:
    candidates = ["average", *perplexity_columns(group)]
    known = [name for name in candidates if name in group and group[name].notna().any()]
    measure = known[0] if known else None
    return measure, measure != "average"


def _best(run: dict[str, Any], dense: dict[str, Any], measure: str) -> Best:
    pruned = pd.notna(run["sparsity"])
    size, full = run["size_mb"], dense.get("size_mb")
    return Best(
        ratio=f"{run['sparsity']:g} %" if pruned else f"{run['bits']:g} bits",
        method=run["method"],
        settings=run["settings"],
        measure=measure if measure == "average" else f"perplexity {measure}",
        score=run[measure],
        dense=dense.get(measure),
        size=size / full if full else None,
    )
