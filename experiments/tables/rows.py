"""Runs as rows, read from their folders."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from camera.evaluation.tasks.names import NINE_TASKS, headline
from camera.runtime.errors import CameraError
from experiments.records.failures import DamagedFileError
from experiments.records.files import COMPRESSION, OutputFolder, RunFiles, read_json
from experiments.records.identity import differing_settings, measurement_key

KEYS = ["model", "method", "settings", "sparsity", "sparsity_of"]
REALISED = ["moe", "model", "routed"]
BITS = ["bits", "bits_raw", "bits_stored", "bits_model"]
CORPORA = ["wikitext2", "c4"]
COSTS = ["size_mb", "minutes", "peak_gb"]
NUMBERS = ["sparsity", *(f"sparsity_{of}" for of in REALISED), *BITS, *COSTS]
NUMBERS += ["alpha", "samples", "length"]
OWN = ["status", "folder"]
SEEDS = ["n", "seeds", "folders"]  # of the rows that experiments.tables.aggregate makes
ERRORS = ("_se", "_std")
UNREADABLE = (DamagedFileError, OSError, KeyError, TypeError, AttributeError)
MADE = ["seed", "alpha", "rank_scope", "calibration", "samples", "length"]


def read_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """One row per run folder, finished or not, in the order of the paper's table.

    Scores and sparsities are in percent, a failed run has its reason in `status`. The columns
    `seed`, `alpha`, `rank_scope`, `calibration` (the text), `samples` and `length` (of one sample
    in tokens, as used) say how it was made, None where that has no meaning; `<task>_se` is the
    standard error of a task's score, `average_se` that of the average (both in percent);
    `folder`, `_path` and `_identity` say where a row comes from and what its result depends on.
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
    frame["settings"] = differing_settings(kinds, list(frame["_identity"]), leave_usual=True)
    order = frame.assign(
        _compressed=frame["method"] != "dense", settings=_natural_ranks(frame["settings"])
    )
    by = ["model", "_compressed", "sparsity", "bits", "method", "settings", "folder"]
    return frame.loc[order.sort_values(by, na_position="first").index].reset_index(drop=True)


def _natural_ranks(texts: pd.Series) -> pd.Series:
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
    """The scores of which less is better: neither shares of right answers nor speeds."""
    return [s for s in score_columns(runs) if f"{s}_se" not in runs and not s.endswith("_x")]


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
    last = ["average", *COSTS, *errors, *MADE, *OWN, "_path", "_identity"]
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
    method = settings["method"]
    return {
        "model": settings["model"]["name"],
        "method": stored["method"],
        "sparsity": _percent(method.get("sparsity")),
        "sparsity_of": method.get("sparsity_of"),
        "bits": method.get("bits"),
        "seed": identity["seed"],
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
    seconds, peak = metrics["seconds"], metrics["peak_memory_bytes"]
    return (
        realised
        | bits
        | metrics["perplexity"]
        | scores
        | _standard_errors(metrics["tasks"])
        | _speeds(metrics.get("speed") or {})
        | {
            "average": metrics["average"],
            "size_mb": metrics["bytes"]["compressed"] / 1e6,
            "minutes": (seconds["calibrate"] + seconds["compress"] + seconds["evaluate"]) / 60,
            "peak_gb": peak / 1e9 if peak else None,
        }
    )


def _calibration(files: RunFiles, asked: dict[str, Any] | None) -> dict[str, Any]:
    """The text that a run was calibrated on: as used where that is known, else as asked."""
    if asked is None:
        return {}
    used = (files.read_part(COMPRESSION) or {}).get("calibration")
    sizes = {key: (used or asked)[key] for key in ("samples", "length")}
    return {"calibration": asked["source"], **sizes}


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
