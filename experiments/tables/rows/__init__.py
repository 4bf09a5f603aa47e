"""Runs as rows, read from their folders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from camera.calibration.corpora import CORPORA
from camera.evaluation.tasks.names import NINE_TASKS
from experiments.records.failures import NoRunsError
from experiments.records.files import OutputFolder, RunFiles
from experiments.records.identity import differing_settings, measurement_key
from experiments.tables.names.datasets import WRITTEN, with_text_named
from experiments.tables.names.divergence import NAMES, measure_and_text
from experiments.tables.names.methods import method_order
from experiments.tables.rows.run import BLOCKS, QUESTIONS, REALISED, row_of

KEYS = ["model", "method", "settings", "sparsity", "sparsity_of"]
BITS = ["bits", "bits_raw", "bits_stored", "bits_model"]
COSTS = ["size_mb", "minutes", "evaluation_minutes", "peak_gb"]
NUMBERS = ["sparsity", *(f"sparsity_{of}" for of in REALISED), *BITS, *COSTS]
NUMBERS += ["cached", "alpha", "samples", "length"]
OWN = ["studies", "data", "status", "folder"]
SEEDS = ["n", "seeds", "folders"]  # of the rows that experiments.tables.aggregate makes
ERRORS = ("_se", "_std")
MADE = ["cached", "seed", "alpha", "rank_scope", "calibration", "samples", "length"]


def read_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """One row per run folder, finished or not, in the order of the paper's table.

    Scores and sparsities are in percent, a failed run has its reason in `status`. The columns
    `seed`, `alpha`, `rank_scope`, `calibration` (the text), `samples` and `length` (of one sample
    in tokens, as used) say how it was made, None where that has no meaning; `<task>_se` is the
    standard error of a task's score, `average_se` that of the average (both in percent),
    `<text>_se` that of a perplexity over its blocks. `kl_<text>` (nats per token),
    `agreement_<text>` and `acceptance_<text>` (in percent) compare with the dense model. `minutes`
    and `peak_gb` are of the compression with the statistics that it used, also where another run
    gathered them (`cached` is 1 then). `studies` are the presets that asked for the run, `data` is
    where its texts and tasks come from; `folder`, `_path` and `_identity` say where a row comes
    from and what its result depends on.
    """
    rows = [row_of(files) for files in map(RunFiles, folders) if files.is_run]
    frame = pd.DataFrame(rows).reindex(columns=_columns(rows))
    if frame.empty:
        return frame
    seeds = [row.get("seed") for row in rows]
    if None in seeds:  # else pandas makes 1234.0 of the others
        frame["seed"] = pd.Series(seeds, dtype=object)
    numbers = [*NUMBERS, *score_columns(frame), *(c for c in frame if c.endswith("_se"))]
    frame[numbers] = frame[numbers].astype(float)
    kinds = list(zip(frame["model"], frame["method"], strict=True))
    frame["settings"] = differing_settings(kinds, named_identities(frame), leave_usual=True)
    order = frame.assign(
        _compressed=frame["method"] != "dense",
        method=frame["method"].map(method_order),
        settings=natural_ranks(frame["settings"]),
    )
    by = ["model", "_compressed", "sparsity", "bits", "method", "settings", "folder"]
    return frame.loc[order.sort_values(by, na_position="first").index].reset_index(drop=True)


def named_identities(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """What the runs depend on, their calibration texts by the names that they may have."""
    return [with_text_named(i, d) for i, d in zip(runs["_identity"], runs["data"], strict=True)]


def natural_ranks(texts: pd.Series) -> pd.Series:
    """The places of texts in an order that takes their numbers as numbers: 64 before 128."""

    def parts(text: str) -> list[str | float]:
        found = re.split(r"(\d+(?:\.\d+)?)", text)
        return [float(part) if number % 2 else part for number, part in enumerate(found)]

    order = sorted(set(texts), key=parts)
    return texts.map({text: place for place, text in enumerate(order)})


def with_dense_rows(runs: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The runs of these names, and the dense ones measured in the same way on the same model."""
    if runs.empty:
        return runs
    own = runs["folder"].isin(names)
    measured = runs["_identity"].map(lambda identity: repr(measurement_key(identity)))
    dense = (runs["method"] == "dense") & (runs["status"] == "done")
    return runs[own | (dense & measured.isin(set(measured[own])))].reset_index(drop=True)


def score_columns(runs: pd.DataFrame) -> list[str]:
    """The columns that say how good a run is: perplexities, tasks, speeds and the average."""
    realised = [f"sparsity_{of}" for of in REALISED]
    others = {*KEYS, *realised, *BITS, *COSTS, *MADE, *OWN, *SEEDS}
    return [
        column
        for column in runs
        if column not in others and not column.startswith("_") and not column.endswith(ERRORS)
    ]


def perplexity_columns(runs: pd.DataFrame) -> list[str]:
    """The scores of which less is better."""
    return [score for score in score_columns(runs) if score in CORPORA]


def divergence_columns(runs: pd.DataFrame) -> list[str]:
    """The scores that compare a model with the dense one, KL divergences first."""
    found = [score for score in score_columns(runs) if measure_and_text(score)]
    return sorted(found, key=lambda score: [*NAMES].index(measure_and_text(score)[0]))


def written_columns(runs: pd.DataFrame) -> list[str]:
    """The scores of tasks whose answers the model writes."""
    return [score for score in score_columns(runs) if score.startswith(WRITTEN)]


def less_is_better(score: str) -> bool:
    """Whether it is a perplexity or a KL divergence."""
    return score in CORPORA or (measure_and_text(score) or ("",))[0] == "kl"


def runs_below(folder: Path) -> pd.DataFrame:
    """The rows of a folder's runs; CameraError where there are none."""
    runs = read_runs(OutputFolder(folder).runs())
    if runs.empty:
        raise NoRunsError(folder)
    return runs


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    found = list(dict.fromkeys(column for row in rows for column in row))
    tasks = [task for task in NINE_TASKS if task in found]
    realised = [f"sparsity_{of}" for of in REALISED]
    errors = [column for column in found if column.endswith("_se")]
    first = [*KEYS, *realised, *BITS, *CORPORA, *tasks]
    last = ["average", *COSTS, *errors, *MADE, *OWN, "_path", "_identity", BLOCKS, QUESTIONS]
    return [*first, *(column for column in found if column not in {*first, *last}), *last]
