"""One run as a row: what its settings asked for, and what was measured, read from its folder."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from camera.calibration.corpora import HUB
from camera.calibration.settings import source_name
from camera.evaluation.tasks.names import headline, headline_metric
from experiments.records.failures import DamagedFileError
from experiments.records.files import COMPRESSION, PERPLEXITY, TASK, RunFiles, read_json
from experiments.tables.names.datasets import WRITTEN
from experiments.tables.names.divergence import NAMES, divergence_column

REALISED = ["moe", "model", "routed"]
BLOCKS = "_blocks"  # column of the mean nll of each block, by text
QUESTIONS = "_questions"  # column of 1 or 0 for each question by task, None where that isn't known
UNREADABLE = (DamagedFileError, OSError, KeyError, TypeError, AttributeError)


def row_of(files: RunFiles) -> dict[str, Any]:
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
        | {QUESTIONS: {task: _of_questions(files, task) for task in metrics["tasks"]}}
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


def _of_questions(files: RunFiles, task: str) -> np.ndarray | None:
    right = (files.read_part(f"{TASK}{task}") or {}).get("right")
    return None if right is None else np.frombuffer(right.encode(), np.uint8) - ord("0")


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
        error = result[f"{headline_metric(result)}_stderr"]
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
