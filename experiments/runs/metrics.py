"""metrics.json: what a finished run reports, the interface that tables and other tools read."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from camera.evaluation.tasks.names import average
from camera.runtime.device.accelerator import device_name, resolve_device
from experiments.config.settings import Settings
from experiments.records.files import PERPLEXITY, SPEED, TASK

PACKAGES = (
    "camera-moe",
    "torch",
    "transformers",
    "lm-eval",
    "datasets",
    "safetensors",
    "numpy",
    "hydra-core",
    "omegaconf",
)
SCORES = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def assemble(
    settings: Settings, compression: dict[str, Any], results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The report of a run from its parts (`perplexity-CORPUS`, `task-NAME`).

    Scores are fractions as lm-eval gives them, `average` is in percent (acc_norm where a task has
    it, else acc), null without tasks; `bytes` are of the tensors on disk, `peak_memory_bytes` is
    of the compression (0 where nothing was compressed), `peak_host_memory_bytes` the process's,
    null in runs of before.
    """
    perplexities = _named(PERPLEXITY, results)
    tasks = _named(TASK, results)
    seconds = dict(compression["seconds"])
    seconds["perplexity"] = sum(part["seconds"] for part in perplexities.values())
    seconds["tasks"] = sum(part["seconds"] for part in tasks.values())
    seconds["speed"] = results.get(SPEED, {}).get("seconds", 0.0)
    seconds["evaluate"] = seconds["perplexity"] + seconds["tasks"] + seconds["speed"]
    return {
        "method": settings.method_name,
        "model": settings.model["name"],
        "settings": settings.to_dict(),
        "sparsity": compression["sparsity"],
        "bits": compression["bits"],
        "perplexity": {name: part["perplexity"] for name, part in perplexities.items()},
        "tasks": {name: {key: part[key] for key in SCORES} for name, part in tasks.items()},
        "average": average(tasks) if tasks else None,
        "speed": results[SPEED]["batches"] if SPEED in results else None,
        "bytes": compression["bytes"],
        "seconds": seconds,
        "peak_memory_bytes": compression["peak_memory_bytes"],
        "peak_host_memory_bytes": compression.get("peak_host_memory_bytes"),
        "evaluation_memory_bytes": max(
            (part["peak_memory_bytes"] for part in results.values()), default=None
        ),
        "coverage": compression["coverage"],
        "versions": _versions(),
        "data_hash": _data_hashes(compression, perplexities | tasks),
        "seed": settings.seed,
        "environment": _environment(settings.device),
    }


def _named(prefix: str, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {k.removeprefix(prefix): part for k, part in results.items() if k.startswith(prefix)}


def _data_hashes(
    compression: dict[str, Any], parts: dict[str, dict[str, Any]]
) -> dict[str, str | None]:
    calibration = (compression.get("calibration") or {}).get("hash")
    return {"calibration": calibration} | {name: part["data_hash"] for name, part in parts.items()}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _environment(device: str) -> dict[str, Any]:
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": device_name(torch.device(resolve_device(device))),
    }
