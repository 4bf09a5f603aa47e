"""One run: compress, measure, draw, log; each part is a file and, once done, stays done."""

from __future__ import annotations

import gc
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

import camera
from camera import parallel
from camera.calibration import Calibration
from camera.checkpoint import load_model, load_tokenizer
from camera.errors import CameraError
from camera.evaluation.parts import Measures, evaluate_streamed
from camera.evaluation.perplexity import perplexity, read_passage
from camera.evaluation.placement import should_stream
from camera.evaluation.speed import measure_speed
from camera.evaluation.tasks import evaluate_tasks
from camera.job import EVALUATION
from camera.memory import Memory
from camera.progress import PeakMemory
from camera.source import resolve_model, write_json
from camera.statistics import Statistics
from experiments.constructor import build
from experiments.figures import draw_bits, draw_energies, draw_widths
from experiments.folders import Folders, read_json
from experiments.histograms import energy_histograms
from experiments.metrics import assemble
from experiments.settings import Settings, arguments, check
from experiments.tracker import NullTracker

log = logging.getLogger("camera")


def run(settings: Settings, sweep: str | None = None, since: float | None = None) -> Path:
    """Do what is not done yet of one run and return its folder, which then holds DONE.

    `sweep` groups runs in the tracker; `force` redoes what was finished before `since` (default:
    now), so that jobs of one sweep that share a run or a checkpoint don't redo each other's.
    What fails is written to the folder's error.txt and raised again, CameraError if the user can
    mend it. Under torchrun rank 0 does all that; the other ranks join it where it compresses.
    """
    folders = Folders.of(settings)
    if parallel.rank() > 0:
        parallel.follow(partial(_camera_compress, settings, folders))
        return folders.run
    try:
        return _run(settings, folders, sweep, since)
    finally:
        parallel.release()


def _run(settings: Settings, folders: Folders, sweep: str | None, since: float | None) -> Path:
    with folders.lock(folders.run):
        if settings.force:
            folders.forget(before=time.time() if since is None else since)
        if folders.done:
            log.info("%s is done already.", folders.run)
            return folders.run
        folders.run.mkdir(parents=True, exist_ok=True)
        (folders.run / "error.txt").unlink(missing_ok=True)
        asked = {"method": settings.method_name, "settings": settings.to_dict()}
        write_json(folders.run / "settings.json", asked | {"identity": folders.identity})
        with _error_file(folders.run), _log_file(folders.run):
            check(settings)
            tracker = build(settings.tracker)
            tracker.start(
                folders.run,
                name=folders.run.name,
                group=sweep,
                job_type=settings.method_name,
                tags=[settings.model["name"], settings.method_name],
                config=settings.to_dict(),
            )
            try:
                metrics = _measure(settings, folders, tracker)
                write_json(folders.run / "metrics.json", metrics)
                tracker.finish(metrics)
            except BaseException as error:
                tracker.fail(sentence(error))
                raise
            (folders.run / "DONE").touch()
    if not settings.keep_checkpoint:
        folders.discard_checkpoint()
    return folders.run


def _measure(settings: Settings, folders: Folders, tracker: NullTracker) -> dict[str, Any]:
    compression = _part(folders, "compress", partial(_compression, settings, folders))
    tracker.log(_numbers("compress", compression))
    _show(settings, folders, compression, tracker)
    results = {}
    _stream(settings, folders)
    with _lazy_model(settings, folders) as model:
        for name, measure in _measurements(settings).items():
            results[name] = _part(folders, name, partial(_measured, measure, model))
            tracker.log(_numbers(name, results[name]))
            log.info("%s: %s", name, _headline(results[name]))
    return assemble(settings, compression, results)


def _part(folders: Folders, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    file = folders.part(name)
    if not file.exists():
        log.info("%s: %s", folders.run.name, name)
        write_json(file, make())
    return read_json(file)


def _compression(settings: Settings, folders: Folders) -> dict[str, Any]:
    if not settings.compresses:
        described = camera.describe(
            settings.model_path, trust_remote_code=settings.trust_remote_code
        )
        return described.to_dict() | {"model": _base_name(settings)}
    with folders.lock(folders.checkpoint):
        _compress(settings, folders)
        return read_json(folders.checkpoint / "camera.json")


def _compress(settings: Settings, folders: Folders) -> None:
    if not folders.compressed:
        parallel.call()
        _camera_compress(settings, folders)


def _camera_compress(settings: Settings, folders: Folders) -> None:
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
        statistics=folders.statistics,
        memory=Memory(**settings.memory),
        measures=_rides_along(settings),
        trust_remote_code=settings.trust_remote_code,
        name=_base_name(settings),
    )


def _base_name(settings: Settings) -> str:
    """The hub id, or for a folder the model's name: a path says nothing on another machine."""
    path = settings.model_path
    return settings.model["name"] if Path(path).expanduser().is_dir() else path


@contextmanager
def _lazy_model(settings: Settings, folders: Folders) -> Iterator[Callable[[], tuple[Any, Any]]]:
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
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _checkpoint(settings: Settings, folders: Folders) -> Iterator[str | Path]:
    """What to evaluate, under a lock so that no other run takes it away while it is read."""
    with folders.lock(folders.checkpoint):
        if settings.compresses:
            _compress(settings, folders)
            yield folders.checkpoint
        else:
            yield settings.model_path


def _load(settings: Settings, folders: Folders) -> tuple[Any, Any]:
    remote = settings.trust_remote_code
    if not sys.stderr.isatty():
        disable_progress_bar()
    with _checkpoint(settings, folders) as path:
        model = load_model(path, settings.device, settings.dtype, remote)
        if settings.evaluation["unpack"] and not settings.evaluation["speed"]["batch_sizes"]:
            camera.dequantize(model)
        return model, load_tokenizer(path, remote)


def _stream(settings: Settings, folders: Folders) -> None:
    """All that isn't measured yet in one read of the weights, where the model doesn't fit."""
    asked, remote = settings.evaluation, settings.trust_remote_code
    rode = folders.checkpoint / EVALUATION
    if rode.exists() and (found := read_json(rode))["measures"] == _measures(settings).to_dict():
        _write_parts(folders, found)
    measures = _measures(settings, folders)
    if asked["stream"] == "never" or not [*measures.corpora, *measures.tasks]:
        return
    with _checkpoint(settings, folders) as path:
        folder = resolve_model(str(path), code=remote)
        if not should_stream(folder, settings.device, settings.dtype, asked["stream"]):
            return
        log.info("%s: evaluating layer by layer", folders.run.name)
        found = evaluate_streamed(
            folder,
            measures,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=remote,
            progress=sys.stderr.isatty(),
            folder=folders.output / "hidden",
        )
    _write_parts(folders, found)


def _write_parts(folders: Folders, found: dict[str, Any]) -> None:
    parts = {f"perplexity-{corpus}": part for corpus, part in found["perplexity"].items()}
    parts |= {f"task-{task}": part for task, part in found["tasks"].items()}
    for name, part in parts.items():
        if not folders.part(name).exists():
            write_json(folders.part(name), part)


def _measures(settings: Settings, folders: Folders | None = None) -> Measures:
    """The texts and tasks asked for, of a run those that aren't measured yet."""
    asked = settings.evaluation
    corpora, tasks = asked["perplexity"], asked["tasks"]
    if folders is not None:
        corpora = [c for c in corpora if not folders.part(f"perplexity-{c}").exists()]
        tasks = [t for t in tasks if not folders.part(f"task-{t}").exists()]
    sizes = (asked[key] for key in ("length", "stride", "blocks", "limit"))
    return Measures(settings.texts(), corpora, tasks, *sizes, settings.seed)


def _rides_along(settings: Settings) -> Measures | None:
    """What is measured while the model is compressed, where even its source doesn't fit."""
    measures, asked = _measures(settings), settings.evaluation
    if asked["stream"] == "never" or not [*measures.corpora, *measures.tasks]:
        return None
    folder = resolve_model(settings.model_path, code=settings.trust_remote_code)
    streamed = should_stream(folder, settings.device, settings.dtype, asked["stream"])
    return measures if streamed else None


def _measurements(settings: Settings) -> dict[str, Callable[[Any, Any], dict[str, Any]]]:
    """What is measured, each by the name of its file."""
    asked, data = settings.evaluation, settings.texts()
    measures: dict[str, Callable[[Any, Any], dict[str, Any]]] = {}
    for corpus in asked["perplexity"]:
        measures[f"perplexity-{corpus}"] = partial(
            perplexity,
            corpus=corpus,
            data=data,
            length=asked["length"],
            stride=asked["stride"],
            limit=asked["blocks"],
            batch_size=asked["perplexity_batch_size"],
        )
    for task in asked["tasks"]:
        measures[f"task-{task}"] = partial(_task, settings, task, data)
    if settings.compresses and asked["speed"]["batch_sizes"]:
        measures["speed"] = partial(_speed, settings)
    return measures


def _speed(settings: Settings, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The compressed model against the original, taking turns in this process."""
    dense = load_model(
        settings.model_path, settings.device, settings.dtype, settings.trust_remote_code
    )
    text = read_passage(dense, tokenizer, corpus="wikitext2", data=settings.texts()).ids_S
    started = time.perf_counter()
    found = measure_speed(dense, model, text, **settings.evaluation["speed"])
    return found | {"seconds": time.perf_counter() - started}


def _measured(
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


def _show(
    settings: Settings, folders: Folders, compression: dict[str, Any], tracker: NullTracker
) -> None:
    figures = []
    seen = folders.checkpoint / "statistics.safetensors"
    alpha = settings.method.get("alpha", settings.alpha)
    if seen.exists() and (histograms := energy_histograms(Statistics.load(seen), alpha)):
        tracker.log_histograms(histograms)
        figures.append(draw_energies(histograms, folders.run / "energies.png"))
    if compression["widths"]:
        widths, full = compression["widths"], compression["full_widths"]
        figures.append(draw_widths(widths, full, folders.run / "widths.png"))
    layers = compression["layers"].values()
    bits = {path: mean for layer in layers for path, mean in layer.get("mean_bits", {}).items()}
    if bits:
        figures.append(draw_bits(bits, folders.run / "bits.png"))
    tracker.log_figures(figures)


def _numbers(prefix: str, part: dict[str, Any]) -> dict[str, float]:
    """The numbers of a part, nested keys joined by slashes."""
    numbers: dict[str, float] = {}
    for key, value in part.items():
        name = f"{prefix}/{key}"
        if isinstance(value, dict) and key not in ("widths", "full_widths", "layers"):
            numbers |= _numbers(name, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[name] = value
    return numbers


def _headline(part: dict[str, Any]) -> str:
    keys = [key for key in ("perplexity", "acc", "acc_norm") if part.get(key) is not None]
    return ", ".join(f"{key} {part[key]:.4g}" for key in keys)


def sentence(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, CameraError) else f"{type(error).__name__}: {text}".rstrip(": ")
    )


@contextmanager
def _error_file(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        (folder / "error.txt").write_text(f"{sentence(error)}\n\n{traceback.format_exc()}")
        raise


@contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
