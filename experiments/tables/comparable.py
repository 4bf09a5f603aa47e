"""Groups of comparable runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.records.identity import differing_settings, measurement_key

OF = {"moe": "of the experts", "model": "of the whole model", "routed": "of the routed experts"}


@dataclass(frozen=True)
class ComparableRuns:
    """One model, measured in one way, and one meaning of sparsity."""

    title: str
    of: str | None  # what sparsity is a share of; None: quantised, or nothing but dense
    runs: pd.DataFrame  # of `over_seeds`, finished

    @property
    def dense(self) -> pd.Series | None:
        """The row that the others are compared with."""
        found = self.runs[self._is_dense]
        return None if found.empty else found.iloc[0]

    def groups(self) -> Iterator[pd.DataFrame]:
        """The dense row, then the others by ratio, the least taken away first."""
        if self._is_dense.any():
            yield self.runs[self._is_dense]
        compressed = self.runs[~self._is_dense]
        descending = compressed.assign(_fewer=-compressed["bits"])
        by = descending.groupby(["sparsity", "_fewer"], dropna=False)
        yield from (compressed.loc[group.index] for _, group in by)

    @property
    def _is_dense(self) -> pd.Series:
        return self.runs["method"] == "dense"


def comparable_runs(means: pd.DataFrame) -> Iterator[ComparableRuns]:
    """The finished rows of `over_seeds` in blocks: pruned before quantised, dense in each.

    `settings` then says only in what the runs of a method differ within the block.
    """
    measured = means["_identity"].map(measurement_key)
    ways = pd.Series(_ways(means["model"], measured), index=means.index, dtype=str)
    for _, part in means.groupby(["model", measured.map(repr)], sort=False):
        title, way = part["model"].iloc[0], ways[part.index[0]]
        dense = part["method"] == "dense"
        for of, words in OF.items():
            pruned = part["sparsity_of"] == of
            if pruned.any():
                yield ComparableRuns(
                    f"{title}, sparsity {words}{way}", of, _with_settings(part[dense | pruned])
                )
        others = part["sparsity_of"].isna()
        if (others & ~dense).any() or dense.all():
            title += ", quantised" if part.loc[others, "bits"].notna().any() else ""
            yield ComparableRuns(f"{title}{way}", None, _with_settings(part[others]))


def _ways(models: pd.Series, measured: pd.Series) -> list[str]:
    """How each run was measured, in brackets, where runs of its model weren't all alike."""
    kinds = [(model,) for model in models]
    evaluations = [way["evaluation"] or {} for way in measured]
    several = differing_settings(kinds, [{"evaluation": evaluation} for evaluation in evaluations])
    others = differing_settings(
        kinds, [way | {"evaluation": None, "weights": _weights(way["model"])} for way in measured]
    )
    ways = [
        ", ".join(filter(None, (_evaluation(evaluation) if differs else "", other)))
        for evaluation, differs, other in zip(evaluations, several, others, strict=True)
    ]
    return [f" ({way})" if way else "" for way in ways]


def _weights(model: str | None) -> str:
    """The start of a folder's fingerprint, or a hub id: two models may have one name."""
    return str(model) if "/" in str(model) else str(model)[:8]


def _evaluation(asked: dict[str, Any]) -> str:
    """What was measured and how much of it, in a few words."""
    texts, tasks, speed = (asked.get(key) for key in ("perplexity", "tasks", "speed"))
    blocks, length, limit = (asked.get(key) for key in ("blocks", "length", "limit"))
    parts = []
    if texts:
        size = "whole texts" if blocks is None else f"{blocks} blocks of each text"
        parts.append(size if length is None else f"{size}, {length} tokens in a block")
    if tasks:
        size = "all questions" if limit is None else f"{limit} questions"
        parts.append(f"{size} of {len(tasks)} tasks")
    if speed:
        parts.append("speed")
    return ", ".join(parts) or "nothing measured"


def _with_settings(runs: pd.DataFrame) -> pd.DataFrame:
    kinds = [(method,) for method in runs["method"]]
    return runs.assign(
        settings=differing_settings(kinds, list(runs["_identity"]), leave_usual=True)
    )
