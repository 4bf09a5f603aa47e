"""Groups of comparable runs: what may stand in one table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.records.identity import differing_settings, measurement_key
from experiments.tables.names.datasets import with_text_named
from experiments.tables.names.methods import method_order
from experiments.tables.names.studies import (
    FORMS,
    PRUNING,
    QUANTISING,
    study_order,
    study_title,
)
from experiments.tables.rows import natural_ranks
from experiments.tables.studies import UNVARIED, with_studies

OF = {"moe": "of the experts", "model": "of the whole model", "routed": "of the routed experts"}


@dataclass(frozen=True)
class ComparableRuns:
    """One study of one model, measured in one way, and one meaning of sparsity."""

    study: str
    model: str
    way: str  # how it was measured, where its model was measured in several ways
    of: str | None  # what sparsity is a share of; None: quantised, or nothing but dense
    runs: pd.DataFrame  # of `over_seeds`, finished

    @property
    def title(self) -> str:
        """Study, model, what the ratio is of, how it was measured where that isn't always alike."""
        of = f", sparsity {OF[self.of]}" if self.of else ""
        way = f" ({self.way})" if self.way else ""
        return f"{study_title(self.study)}: {self.model}{of}{way}"

    @property
    def data(self) -> str:
        """Where its texts and tasks come from, as `dataset_label` takes it."""
        return str(self.runs["data"].iloc[0])

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
    """The finished rows of `over_seeds` in blocks: study by study, the dense row in each.

    A run that serves several studies stands in each of them. `settings` then says only in what the
    runs of a method differ within the block.
    """
    if means.empty:
        return
    measured = means["_identity"].map(measurement_key)
    ways = pd.Series(_ways(means["model"], measured), index=means.index, dtype=str)
    alike = means["model"] + " " + measured.map(repr)
    dense = means["method"] == "dense"
    means = with_studies(means)
    for place in means.index[dense & ~alike.isin(set(alike[~dense]))]:  # it is all there is
        means.at[place, "studies"] = [PRUNING]
    for study in sorted({*means["studies"].explode().dropna()}, key=study_order):
        asked = means["studies"].map(lambda own, study=study: study in own)
        for _, part in means[asked].groupby(alike[asked], sort=False):
            others = dense & (alike == alike[part.index[0]])
            rows = means[others | means.index.isin(part.index)]
            yield from _blocks(study, rows, ways[part.index[0]])


def _blocks(study: str, part: pd.DataFrame, way: str) -> Iterator[ComparableRuns]:
    """Of a study's runs on one model, measured in one way: pruned before quantised, apart unless
    the study compares forms."""
    model, dense = part["model"].iloc[0], part["method"] == "dense"
    others, together = part["sparsity_of"].isna(), False
    for of in OF:
        pruned = part["sparsity_of"] == of
        if pruned.any():
            together = study in FORMS
            rows = part[pruned | (others if together else dense)]
            yield ComparableRuns(study, model, way, of, _in_order(rows, study))
    if not together and ((others & ~dense).any() or dense.all()):
        yield ComparableRuns(study, model, way, None, _in_order(part[others], study))


def _in_order(runs: pd.DataFrame, study: str) -> pd.DataFrame:
    """The rows by method and settings; an ablation tells every setting, the usual ones too."""
    told = runs.assign(settings=settings_told(runs, leave_usual=study in (PRUNING, QUANTISING)))
    order = told.assign(
        method=told["method"].map(method_order), settings=natural_ranks(told["settings"])
    )
    return told.loc[order.sort_values(["method", "settings"], kind="stable").index]


def settings_told(runs: pd.DataFrame, *, leave_usual: bool) -> list[str]:
    """In what each row differs from others of its method, texts by the names they may have."""
    kinds = [(method,) for method in runs["method"]]
    named = [
        {k: v for k, v in with_text_named(identity, data).items() if k not in UNVARIED}
        for identity, data in zip(runs["_identity"], runs["data"], strict=True)
    ]
    told = differing_settings(kinds, named, leave_usual=leave_usual)
    told = [text.replace("calibration.source=", "text=") for text in told]
    told = [text.replace("calibration.", "") for text in told]
    return [re.sub(r"=(-?\d+)\.0(?=,|$)", r"=\1", text) for text in told]  # 0 as it was typed


def _ways(models: pd.Series, measured: pd.Series) -> list[str]:
    """How each run was measured, where runs of its model weren't all alike."""
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
    return ways


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
    if top := asked.get("divergence"):
        parts.append(f"KL by {top} tokens")
    if tasks:
        size = "all questions" if limit is None else f"{limit} questions"
        parts.append(f"{size} of {len(tasks)} tasks")
    if written := (asked.get("generative") or {}).get("tasks"):
        parts.append(f"{len(written)} tasks with written answers")
    if speed:
        parts.append("speed")
    return ", ".join(parts) or "nothing measured"
