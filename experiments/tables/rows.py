"""Runs as rows, read from their folders."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from camera.calibration.corpora import CORPORA, HUB
from camera.calibration.settings import source_name
from camera.evaluation.tasks.names import NINE_TASKS, headline
from camera.runtime.errors import CameraError
from experiments.records.failures import DamagedFileError
from experiments.records.files import (
    COMPRESSION,
    PERPLEXITY,
    OutputFolder,
    RunFiles,
    read_json,
)
from experiments.records.identity import differing_settings, measurement_key
from experiments.tables.names.datasets import WRITTEN, with_text_named
from experiments.tables.names.divergence import NAMES, divergence_column, measure_and_text
from experiments.tables.names.methods import method_order

KEYS = ["model", "method", "settings", "sparsity", "sparsity_of"]
REALISED = ["moe", "model", "routed"]
BITS = ["bits", "bits_raw", "bits_stored", "bits_model"]
COSTS = ["size_mb", "minutes", "evaluation_minutes", "peak_gb"]
NUMBERS = ["sparsity", *(f"sparsity_{of}" for of in REALISED), *BITS, *COSTS]
NUMBERS += ["cached", "alpha", "samples", "length"]
OWN = ["studies", "data", "status", "folder"]
SEEDS = ["n", "seeds", "folders"]  # of the rows that experiments.tables.aggregate makes
ERRORS = ("_se", "_std")
BLOCKS = "_blocks"  # column of a run's mean nll of each block, by text
UNREADABLE = (DamagedFileError, OSError, KeyError, TypeError, AttributeError)
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
    rows = [_row(files) for files in map(RunFiles, folders) if files.is_run]
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
        raise CameraError(f"{folder} has no runs; give the folder that was `output`.")
    return runs


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    found = list(dict.fromkeys(column for row in rows for column in row))
    tasks = [task for task in NINE_TASKS if task in found]
    realised = [f"sparsity_{of}" for of in REALISED]
    errors = [column for column in found if column.endswith("_se")]
    first = [*KEYS, *realised, *BITS, *CORPORA, *tasks]
    last = ["average", *COSTS, *errors, *MADE, *OWN, "_path", "_identity", BLOCKS]
    return [*first, *(column for column in found if column not in {*first, *last}), *last]


def _row(files: RunFiles) -> dict[str, Any]:
    """The run's row; of files that can't be read, or are of another layout, a row that says so."""
    try:
        row = _asked(files)
    except UNREADABLE as error:
        return {
            "model": files.folder.name,
            "method": "unknown",
            "status": f"damaged: {files.settings.name}{_lacking(error)}",
            "folder": files.folder.name,
            "studies": [],
            "_path": files.folder,
            "_identity": {"method": {}},
        }
    if row["status"] != "done":
        return row
    try:
        return row | _measured(files, row["bits"] is not None)
    except UNREADABLE as error:
        return row | {"status": f"damaged: {files.metrics.name}{_lacking(error)}"}


def _lacking(error: Exception) -> str:
    return f" (lacks {error})" if isinstance(error, KeyError) else ""


def _asked(files: RunFiles) -> dict[str, Any]:
    stored = read_json(files.settings)
    settings, identity = stored["settings"], stored["identity"]
    origin = stored.get("origin") or {}  # of a checkpoint that was compressed before
    method = settings["method"] | origin
    return {
        "model": settings["model"]["name"],
        "method": origin.get("method", stored["method"]),
        "sparsity": _percent(method.get("sparsity")),
        "sparsity_of": method.get("sparsity_of"),
        "bits": method.get("bits"),
        "seed": identity["seed"],
        "studies": files.studies,
        "data": settings.get("data", HUB),
        "alpha": method.get("alpha"),
        "rank_scope": method.get("rank_scope"),
        "status": _status(files),
        "folder": files.folder.name,
        "_path": files.folder,
        "_identity": identity,
    } | _calibration(files, identity.get("calibration"))


def _measured(files: RunFiles, quantised: bool) -> dict[str, Any]:
    metrics = read_json(files.metrics)
    realised = {f"sparsity_{of}": _percent(metrics["sparsity"][of]) for of in REALISED}
    bits = {f"bits_{of}": value for of, value in metrics["bits"].items()} if quantised else {}
    scores = {task: 100 * headline(result) for task, result in metrics["tasks"].items()}
    return (
        realised
        | bits
        | metrics["perplexity"]
        | scores
        | _standard_errors(metrics["tasks"])
        | _written(metrics.get("generative") or {})
        | _divergences(metrics.get("divergence") or {})
        | _of_blocks(files, metrics["perplexity"])
        | _speeds(metrics.get("speed") or {})
        | _costs(metrics)
        | {"average": metrics["average"]}
        | ({"data": metrics["data"]} if "data" in metrics else {})
    )


def _costs(metrics: dict[str, Any]) -> dict[str, Any]:
    """Of the compression with the statistics that it used; nothing where none took place."""
    seconds, used = metrics["seconds"], metrics.get("cached_statistics") or {}
    spent = seconds["calibrate"] + seconds["compress"] + used.get("seconds", 0.0)
    peak = max(metrics["peak_memory_bytes"] or 0, used.get("peak_memory_bytes", 0))
    return {
        "size_mb": metrics["bytes"]["compressed"] / 1e6,
        "minutes": spent / 60 or None,
        "evaluation_minutes": seconds["evaluate"] / 60 or None,
        "peak_gb": peak / 1e9 or None,
        "cached": float(bool(used)),
    }


def _of_blocks(files: RunFiles, perplexities: dict[str, float]) -> dict[str, Any]:
    """Of each perplexity its standard error; of it and of each divergence the mean of each block
    (of a perplexity that of the nll)."""
    parts = {text: files.read_part(f"{PERPLEXITY}{text}") or {} for text in perplexities}
    means = {t: part["nll_per_block"] for t, part in parts.items() if "nll_per_block" in part}
    for text, part in parts.items():
        for measure in NAMES:
            if blocks := part.get("divergence", {}).get(f"{measure}_per_block"):
                means[divergence_column(measure, text)] = blocks
    errors = {t: part.get("nll_stderr") for t, part in parts.items()}
    own = {f"{t}_se": perplexities[t] * error for t, error in errors.items() if error is not None}
    return own | {BLOCKS: means}


def _divergences(by_text: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of each text KL in nats per token, agreement and acceptance in percent, and their errors."""
    found = {}
    for text, part in by_text.items():
        for measure in NAMES:
            column, unit = divergence_column(measure, text), 1 if measure == "kl" else 100
            found[column] = unit * part[measure]
            if (error := part[f"{measure}_stderr"]) is not None:
                found[f"{column}_se"] = unit * error
    return found


def _written(by_task: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of each task whose answers are written its score and error, in percent."""
    found = {f"{WRITTEN}{task}": 100 * part["score"] for task, part in by_task.items()}
    errors = {f"{WRITTEN}{task}_se": part["stderr"] for task, part in by_task.items()}
    return found | {key: 100 * error for key, error in errors.items() if error is not None}


def _calibration(files: RunFiles, asked: dict[str, Any] | None) -> dict[str, Any]:
    """The text that a run was calibrated on: as used where that is known, else as asked."""
    if asked is None:
        return {}
    used = (files.read_part(COMPRESSION) or {}).get("calibration")
    sizes = {key: (used or asked)[key] for key in ("samples", "length")}
    return {"calibration": source_name(asked), **sizes}


def _standard_errors(tasks: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Of each task's headline, and of their mean as that of independent scores; in percent."""
    errors = {}
    for task, result in tasks.items():
        metric = "acc" if result["acc_norm"] is None else "acc_norm"
        error = result[f"{metric}_stderr"]
        errors[f"{task}_se"] = None if error is None else 100 * error
    known = None not in errors.values() and errors
    mean = math.hypot(*errors.values()) / len(errors) if known else None
    return errors | {"average_se": mean}


def _speeds(batches: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as fast as the original: `prefill_x` of the first batch, `prefill_16_x`."""
    return {
        f"{phase}_x" if number == 0 else f"{phase}_{size}_x": part["ratio"]
        for number, (size, phases) in enumerate(batches.items())
        for phase, part in phases.items()
    }


def _status(files: RunFiles) -> str:
    if files.is_done:
        return "done"
    if files.failure:
        return f"failed: {files.failure}"
    if files.reason:
        return "interrupted"
    return f"damaged: {files.metrics.name}" if files.done.exists() else "unfinished"


def _percent(fraction: float | None) -> float | None:
    # Without it 0.6 reads as 60.000000000000005 hundredths.
    return None if fraction is None else round(100 * fraction, 10)
