"""metrics.json: what a finished run reports, the interface that tables and other tools read."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from camera.evaluation.tasks.names import average
from camera.runtime.device.accelerator import device_name, resolve_device
from experiments.config.settings import Settings
from experiments.records.files import GENERATIVE, PERPLEXITY, SPEED, TASK
from experiments.tables.names.datasets import data_name

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
DIVERGENCE = ("kl", "kl_stderr", "agreement", "agreement_stderr", "acceptance")
DIVERGENCE += ("acceptance_stderr", "top", "vocabulary", "kept")
SCORES = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def assemble(
    settings: Settings, compression: dict[str, Any], results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The report of a run from its parts (`perplexity-CORPUS`, `task-NAME`).

    Scores are fractions as lm-eval gives them, as are agreement and acceptance of `divergence`, the
    comparison with the dense model on each text (its `kl` in nats per token); `average` is in
    percent (acc_norm where a task has it, else acc), null without tasks; `data` is where texts and
    tasks come from: hub, embedded or a folder's name; `cached_statistics` are the seconds and the
    peak memory of statistics that the compression used and another run had gathered; `bytes` are of
    the tensors on disk, `peak_memory_bytes` is of the compression (0 where nothing was compressed),
    `peak_host_memory_bytes` the process's then, null in runs of before.
    """
    perplexities = _named(PERPLEXITY, results)
    tasks = _named(TASK, results)
    written = _named(GENERATIVE, results)
    seconds = dict(compression["seconds"])
    seconds["perplexity"] = sum(part["seconds"] for part in perplexities.values())
    seconds["tasks"] = sum(part["seconds"] for part in tasks.values())
    seconds["generative"] = sum(part["seconds"] for part in written.values())
    seconds["speed"] = results.get(SPEED, {}).get("seconds", 0.0)
    measured = ("perplexity", "tasks", "generative", "speed")
    seconds["evaluate"] = sum(seconds[kind] for kind in measured)
    return {
        "method": settings.method_name,
        "model": settings.model["name"],
        "settings": settings.to_dict(),
        "sparsity": compression["sparsity"],
        "bits": compression["bits"],
        "perplexity": {name: part["perplexity"] for name, part in perplexities.items()},
        "divergence": {
            name: {key: found for key, found in part["divergence"].items() if key in DIVERGENCE}
            for name, part in perplexities.items()
            if "divergence" in part
        },
        "tasks": {name: {key: part[key] for key in SCORES} for name, part in tasks.items()},
        "generative": {
            name: {key: part[key] for key in ("metric", "score", "stderr", "metrics", "n")}
            for name, part in written.items()
        },
        "average": average(tasks) if tasks else None,
        "speed": results[SPEED]["batches"] if SPEED in results else None,
        "data": data_name(settings.data),
        "bytes": compression["bytes"],
        "seconds": seconds,
        "cached_statistics": compression.get("cached_statistics"),
        "peak_memory_bytes": compression["peak_memory_bytes"],
        "peak_host_memory_bytes": compression.get("peak_host_memory_bytes"),
        "evaluation_memory_bytes": max(
            (part["peak_memory_bytes"] for part in results.values()), default=None
        ),
        "coverage": compression["coverage"],
        "versions": _versions(),
        "data_hash": _data_hashes(compression, perplexities | tasks),
        "seed": settings.seed,
        "environment": environment(settings.device),
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


def _commit() -> str | None:
    """The commit of the checkout that this code is in, with what isn't committed said."""
    top = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(top), *arguments]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != top:  # installed within another's checkout
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _overrides() -> list[str] | None:
    """What was said on Hydra's command line to make this run."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None


def environment(device: str) -> dict[str, Any]:
    """When and where a run on this device ended."""
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "overrides": _overrides(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": device_name(torch.device(resolve_device(device))),
    }
