"""The shared cache of statistics: a pass over the dense model is done once for all who need it."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from filelock import FileLock

from camera.calibration.statistics import LayerStatistics, Statistics
from camera.calibration.tokens import CalibrationTokens
from camera.checkpoint.source import fingerprint
from camera.pipeline.context import PassContext
from camera.pipeline.result import versions
from camera.pipeline.resume import PassProgress, code_version
from camera.runtime import distributed
from camera.runtime.errors import CameraError
from camera.runtime.files import content_key, partial_of, replace_durably, write_json
from camera.streaming.skeleton import MetaModel

log = logging.getLogger("camera")
Gather = Callable[[PassProgress, Path], Statistics]
"""gather(progress, folder): the statistics, going on where `progress` stopped."""


def gathered_once(
    context: PassContext,
    key: dict[str, Any],
    kind: type[LayerStatistics],
    owner: type,
    gather: Gather,
) -> Statistics:
    """Statistics of the original model: read from the cache if gathered before, else gathered.

    `key` says what is seen (its `kind` first), `owner` the class whose code sees it: runs that
    agree share a file. A file of another kind, or a damaged one, is gathered anew. Beside it stands
    what it took, which the report of a run that reads it tells as `cached_statistics`.
    """
    model = context.streamer.model
    folder = context.request.statistics or context.request.private_statistics
    about = {
        "weights": fingerprint(model.folder),
        "tokens": tokens_key(context.request.tokens),
        "dtype": str(model.dtype),
        "statistics": key,
        "experts_on_disk": context.estimate.experts_on_disk,
        **computed_by(model, owner),
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{model.config.model_type}-{key['kind']}-{content_key(about)}"
    path = folder / f"{name}.safetensors"
    first = distributed.rank() == 0
    state, cost, asked = context.state, path.with_suffix(".json"), perf_counter()
    with FileLock(f"{path}.lock") if first else nullcontext():  # a sweep's jobs measure once
        state.seconds["calibrate"] -= perf_counter() - asked  # another run's time, told as such
        if distributed.all_min(_holds(path, kind)):
            state.used(**_cost(cost))
        else:
            progress = PassProgress(folder / f".{name}" / "progress", about)
            found = gather(progress, folder / f".{name}")
            state.seconds["calibrate"] += progress.seconds_before
            if first:
                partial = partial_of(path)
                found.save(partial)
                seconds, peak = round(progress.seconds, 3), context.memory.bytes
                write_json(cost, {"seconds": seconds, "peak_memory_bytes": peak})
                replace_durably(partial, path)
            progress.clear()
    return Statistics.load(path)


def _cost(file: Path) -> dict[str, Any]:
    """What it took to gather statistics; nothing known of files of earlier versions."""
    unknown = {"seconds": 0.0, "peak_memory_bytes": 0}
    try:
        return unknown | json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return unknown


def _holds(path: Path, kind: type[LayerStatistics]) -> bool:
    if not path.exists():
        return False
    try:
        layers = Statistics.load(path).layers.values()
    except CameraError as error:
        log.warning("gathering anew: %s", error)
        return False
    return all(isinstance(layer, kind) for layer in layers)


def tokens_key(tokens: CalibrationTokens) -> list[Any]:
    """Which tokens, in how many samples of what length."""
    return [tokens.hash, *tokens.ids_NL.shape]


def computed_by(model: MetaModel, owner: type) -> dict[str, Any]:
    """What else than the inputs decides the bytes of a result of this class's code
    (`camera.pipeline.resume.COMPUTED_BY`)."""
    package = sys.modules[owner.__module__.partition(".")[0]]
    files = [Path(inspect.getfile(owner))]
    if hasattr(package, "__path__"):  # a namespace package has no file of its own
        files = sorted(path for folder in package.__path__ for path in Path(folder).rglob("*.py"))
    return {
        "code": code_version(*files),
        "device": model.device.type,
        "processes": distributed.world(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "versions": versions(),
    }
