"""Evaluation steps of a run, one file each."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from transformers.utils.logging import disable_progress_bar

import camera
from camera.checkpoint.loading import load_model, load_tokenizer
from camera.checkpoint.source import resolve_model
from camera.evaluation.divergence.reference import DenseReference
from camera.evaluation.passages import read_passage
from camera.evaluation.perplexity import perplexity
from camera.evaluation.placement import require_fit, should_stream
from camera.evaluation.speed import measure_speed
from camera.evaluation.suite import EvaluationRequest, evaluate_streamed, passages_of
from camera.evaluation.tasks.evaluate import evaluate_tasks
from camera.evaluation.tasks.generative import evaluate_generative
from camera.evaluation.tasks.names import task_name
from camera.runtime.device.accelerator import release_cache
from camera.runtime.device.peak_memory import PeakMemory
from camera.runtime.files import write_json
from camera.streaming.skeleton import MetaModel
from experiments.config.settings import Settings
from experiments.records.files import GENERATIVE, PERPLEXITY, SPEED, TASK, is_json, read_json
from experiments.records.folders import Folders
from experiments.runs.compression import checkpoint

log = logging.getLogger("camera")


@contextmanager
def lazy_model(settings: Settings, folders: Folders) -> Iterator[Callable[[], tuple[Any, Any]]]:
    """The model and its tokenizer, loaded when first asked for: done parts need neither."""
    loaded: list[Any] = []

    def load() -> tuple[Any, Any]:
        if not loaded:
            loaded.extend(_load(settings, folders))
        return loaded[0], loaded[1]

    try:
        yield load
    finally:
        loaded.clear()
        gc.collect()
        release_cache()


def _load(settings: Settings, folders: Folders) -> tuple[Any, Any]:
    remote = settings.trust_remote_code
    if not sys.stderr.isatty():
        disable_progress_bar()
    with checkpoint(settings, folders) as path:
        _require_fit(str(path), settings, "measuring a whole model")
        model = load_model(path, settings.device, settings.dtype, remote)
        if settings.evaluation["dequantize"] and not settings.evaluation["speed"]["batch_sizes"]:
            camera.dequantize(model)
        return model, load_tokenizer(path, remote)


def _require_fit(model: str, settings: Settings, what: str) -> None:
    require_fit(
        resolve_model(model),
        settings.device,
        settings.dtype,
        what,
        "set evaluation.speed.batch_sizes=[] and evaluation.generative.tasks=[], for which a model "
        "can't be read layer by layer, and evaluation.stream=auto, or take a machine with "
        "more memory",
    )


def stream(settings: Settings, folders: Folders) -> None:
    """All that isn't measured yet in one read of the weights, where the model doesn't fit."""
    asked, remote = settings.evaluation, settings.trust_remote_code
    early = folders.evaluation
    if is_json(early) and (found := read_json(early))["measures"] == settings.measures().to_dict():
        _write_parts(folders, found)
    measures = _due(settings, folders)
    predict_densely(settings, folders, measures)
    if asked["stream"] == "never" or not [*measures.corpora, *measures.tasks]:
        return
    with checkpoint(settings, folders) as path:
        folder = resolve_model(str(path))
        if not should_stream(folder, settings.device, settings.dtype, asked["stream"]):
            return
        log.info("%s: evaluating layer by layer", folders.name)
        found = evaluate_streamed(
            folder,
            measures,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=remote,
            folder=folders.output.hidden,
            reference=dense_reference(settings, folders),
        )
    _write_parts(folders, found)


def dense_reference(settings: Settings, folders: Folders) -> DenseReference:
    """The original model's predictions, kept beside its statistics for all runs of the output."""
    return DenseReference(
        resolve_model(settings.model_path),
        folders.output.statistics,
        settings.device,
        settings.dtype,
        settings.trust_remote_code,
        folders.output.hidden,
    )


def predict_densely(settings: Settings, folders: Folders, measures: EvaluationRequest) -> None:
    """What divergences compare with, of all texts in one pass, unless an earlier run left it."""
    if not measures.corpora:
        return
    if measures.divergence is None:
        if settings.evaluation.get("divergence") is not None:
            log.info("%s is compressed itself: compared with no dense model.", folders.name)
        return
    remote = settings.trust_remote_code
    folder = resolve_model(settings.model_path)
    meta = MetaModel(folder, "cpu", settings.dtype, remote)
    passages = passages_of(meta.model, load_tokenizer(folder, remote), measures)
    dense_reference(settings, folders).of(passages, measures.divergence)


def _write_parts(folders: Folders, found: dict[str, Any]) -> None:
    parts = {f"{PERPLEXITY}{corpus}": part for corpus, part in found["perplexity"].items()}
    parts |= {f"{TASK}{task}": part for task, part in found["tasks"].items()}
    for name, part in parts.items():
        if not is_json(folders.files.part(name)):
            write_json(folders.files.part(name), part)


def _due(settings: Settings, folders: Folders) -> EvaluationRequest:
    asked = settings.measures()
    return replace(
        asked,
        corpora=[c for c in asked.corpora if not is_json(folders.files.part(f"{PERPLEXITY}{c}"))],
        tasks=[t for t in asked.tasks if not is_json(folders.files.part(f"{TASK}{t}"))],
    )


def measurements(
    settings: Settings, folders: Folders
) -> dict[str, Callable[[Any, Any], dict[str, Any]]]:
    """What is measured, each by the name of its file."""
    asked, data = settings.evaluation, settings.texts()
    measures: dict[str, Callable[[Any, Any], dict[str, Any]]] = {}
    for corpus in asked["perplexity"]:
        measures[f"{PERPLEXITY}{corpus}"] = partial(
            perplexity,
            corpus=corpus,
            data=data,
            length=asked["length"],
            stride=asked["stride"],
            limit=asked["blocks"],
            batch_size=asked["perplexity_batch_size"],
            reference=dense_reference(settings, folders),
            top=settings.divergence,
        )
    for task in asked["tasks"]:
        measures[f"{TASK}{task}"] = partial(_task, settings, task, data)
    written = asked.get("generative") or {}
    for task in written.get("tasks", []):
        measures[f"{GENERATIVE}{task_name(task)}"] = partial(_generative, settings, task, data)
    if settings.compresses and asked["speed"]["batch_sizes"]:
        measures[SPEED] = partial(_speed, settings)
    return measures


def _speed(settings: Settings, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The compressed model against the original, taking turns in this process."""
    _require_fit(settings.model_path, settings, "measuring speed beside the original model")
    dense = load_model(
        settings.model_path, settings.device, settings.dtype, settings.trust_remote_code
    )
    text = read_passage(dense, tokenizer, corpus="wikitext2", data=settings.texts()).ids_S
    started = time.perf_counter()
    found = measure_speed(dense, model, text, **settings.evaluation["speed"])
    return found | {"seconds": time.perf_counter() - started}


def measured(
    measure: Callable[[Any, Any], dict[str, Any]], model: Callable[[], tuple[Any, Any]]
) -> dict[str, Any]:
    network, tokenizer = model()
    with PeakMemory(network.device) as memory:
        part = measure(network, tokenizer)
    return part | {"peak_memory_bytes": memory.bytes}


def _task(settings: Settings, task: str, data: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    results = evaluate_tasks(
        model,
        tokenizer,
        [task],
        data=data,
        limit=settings.evaluation["limit"],
        batch_size=settings.evaluation["batch_size"],
        seed=settings.seed,
    )
    return results[task]


def _generative(
    settings: Settings, task: str, data: str, model: Any, tokenizer: Any
) -> dict[str, Any]:
    options = {k: v for k, v in settings.evaluation["generative"].items() if k != "tasks"}
    found = evaluate_generative(model, tokenizer, [task], data=data, seed=settings.seed, **options)
    return found[task_name(task)]
