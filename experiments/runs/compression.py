"""The first part of a run: the model, compressed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import camera
from camera.calibration.settings import Calibration
from camera.checkpoint.source import resolve_model
from camera.evaluation.placement import should_stream
from camera.evaluation.suite import EvaluationRequest
from camera.moe.budget import Budget
from camera.pipeline import model_card
from camera.pipeline.context import CompressionListener
from camera.runtime import distributed
from camera.runtime.device.accelerator import resolve_device
from camera.streaming.settings import MemoryChoices
from camera.streaming.skeleton import MetaModel
from experiments.config.constructor import build
from experiments.config.location import EMBEDDED
from experiments.config.settings import Settings, arguments
from experiments.records.files import lock_of, read_json
from experiments.records.folders import Folders
from experiments.records.origin import report_of
from experiments.runs import ranks


def compression(
    settings: Settings, folders: Folders, listener: CompressionListener
) -> dict[str, Any]:
    """What compressing reports, done before or now; of the dense model what there is to report."""
    if not settings.compresses:
        described = camera.describe(
            settings.model_path, trust_remote_code=settings.trust_remote_code
        )
        found = described.to_dict() | {"model": base_name(settings)}
        return found | _made_before(settings, found["bytes"]["compressed"])
    with lock_of(folders.checkpoint):
        compress_once(settings, folders, listener)
        return read_json(folders.report)


def _made_before(settings: Settings, size: int) -> dict[str, Any]:
    """Of a checkpoint that is compressed already what its own report says of it."""
    report = report_of(resolve_model(settings.model_path))
    if report is None:
        return {}
    kept = {key: report[key] for key in ("sparsity", "bits")}
    return kept | {"bytes": {"dense": report["bytes"]["dense"], "compressed": size}}


def computed_in(settings: Settings) -> dict[str, str]:
    """What `auto` comes to on this machine: results of others aren't compared with these."""
    device = torch.device(resolve_device(settings.device)).type
    auto = "float32" if device == "cpu" else "the stored dtype"
    return {"device": device, "dtype": auto if settings.dtype == "auto" else settings.dtype}


def check_method(settings: Settings) -> None:
    """CameraError for what the method can't do with this model, before any weight is read."""
    if settings.compresses:
        build(settings.method).check(budget_of(settings))


def budget_of(settings: Settings) -> Budget:
    """What the model has, by its configuration and the headers of its files."""
    model = resolve_model(settings.model_path)
    return _budget(model, settings.dtype, settings.trust_remote_code)


@lru_cache(maxsize=1)
def _budget(model: Path, dtype: str, trust_remote_code: bool) -> Budget:
    return MetaModel(model, "cpu", dtype, trust_remote_code).budget


def compress_once(
    settings: Settings, folders: Folders, listener: CompressionListener | None = None
) -> None:
    """Make the checkpoint, with whatever other ranks there are, if it isn't there."""
    if not folders.is_compressed:
        folders.remove_damaged_checkpoint()
        distributed.start_workers()
        with ranks.together():
            camera_compress(settings, folders, listener)


def camera_compress(
    settings: Settings, folders: Folders, listener: CompressionListener | None = None
) -> None:
    """`camera.compress` as the settings ask for it."""
    camera.compress(
        settings.model_path,
        build(settings.method),
        folders.checkpoint,
        calibration=Calibration(**arguments(settings.calibration)),
        propagate=settings.propagate,
        data=settings.texts(),
        seed=settings.seed,
        device=settings.device,
        dtype=settings.dtype,
        save_dtype=settings.save_dtype,
        store=settings.store,
        statistics=folders.output.statistics,
        memory=MemoryChoices(**settings.memory),
        measures=evaluation_during_compression(settings),
        trust_remote_code=settings.trust_remote_code,
        name=base_name(settings),
        listener=listener,
    )


def base_name(settings: Settings) -> str:
    """The hub id, or for a folder the model's name: a path says nothing on another machine."""
    path, name = settings.model["path"], settings.model["name"]
    if path == EMBEDDED or (Path(path).is_dir() and "/" not in model_card.base_name(path)):
        return name
    return model_card.base_name(path)


@contextmanager
def checkpoint(settings: Settings, folders: Folders) -> Iterator[Path]:
    """What to evaluate, under a lock so that no other run takes it away while it is read."""
    with lock_of(folders.checkpoint):
        if settings.compresses:
            compress_once(settings, folders)
            yield folders.checkpoint
        else:
            yield resolve_model(settings.model_path)


def evaluation_during_compression(settings: Settings) -> EvaluationRequest | None:
    """What is measured while the model is compressed, where even its source doesn't fit."""
    measures, asked = settings.measures(), settings.evaluation
    if asked["stream"] == "never" or not [*measures.corpora, *measures.tasks]:
        return None
    folder = resolve_model(settings.model_path)
    streamed = should_stream(folder, settings.device, settings.dtype, asked["stream"])
    return measures if streamed else None
