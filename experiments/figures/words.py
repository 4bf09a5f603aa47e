"""What figures say of runs in words: model, method, ratio, calibration and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from camera.calibration.corpora import HUB
from camera.calibration.settings import source_name
from experiments.config.location import EMBEDDED
from experiments.tables.names.datasets import data_name, dataset_label
from experiments.tables.names.methods import display_name

SHARE_OF = {
    "moe": "of the experts",
    "model": "of the whole model",
    "routed": "of the routed experts",
}


@dataclass(frozen=True)
class Heading:
    """What a figure shows, and below it in small letters of what."""

    head: str
    words: str


def run_words(asked: dict[str, Any], alpha: float | None = None) -> str:
    """A run's model, method, ratio and calibration, from its settings.json; α where it matters."""
    settings, identity = asked["settings"], asked.get("identity", {})
    data = data_name(settings.get("data", HUB))
    parts = [
        model_words(settings["model"]["name"], data),
        display_name(asked["method"]),
        ratio_words(settings["method"]),
        "" if alpha is None else f"α\u00a0=\u00a0{alpha:g}",
        calibration_words(identity.get("calibration"), data),
    ]
    return " · ".join(filter(None, parts))


def model_words(name: str, data: str) -> str:
    """A model's name; that of the embedded one says what it is."""
    return f"{name}, the embedded model" if data == EMBEDDED else name


def calibration_words(calibration: dict[str, Any] | None, data: str) -> str:
    """The text that statistics are of, and how much of it; empty where there is none."""
    if not calibration:
        return ""
    text = dataset_label(source_name(calibration), data)
    return f"calibrated on {calibration['samples']} samples of {text}"


def ratio_words(method: dict[str, Any]) -> str:
    """How much a method removes, or what it leaves: from its settings."""
    if method.get("sparsity") is not None:
        of = SHARE_OF.get(method.get("sparsity_of", "moe"), "")
        return f"{100 * method['sparsity']:.3g}\u00a0% {of} removed"
    return f"{method['bits']:g} bits" if method.get("bits") is not None else ""


def evaluation_words(asked: dict[str, Any]) -> str:
    """How much of the texts and tasks was measured."""
    blocks, limit, tasks = (asked.get(key) for key in ("blocks", "limit", "tasks"))
    parts = []
    if asked.get("perplexity"):
        parts.append("whole texts" if blocks is None else f"{blocks} blocks of each text")
    if tasks:
        size = "all questions" if limit is None else f"{limit} questions of each"
        parts.append(f"{size} of {len(tasks)} tasks")
    return ", ".join(parts)
