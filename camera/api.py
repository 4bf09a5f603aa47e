"""From a model and a method to a smaller checkpoint: the entry point of every method."""

import logging
from pathlib import Path
from typing import Any

from camera.calibration.settings import Calibration
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.loading import load_tokenizer, resolve_device
from camera.checkpoint.source import resolve_model
from camera.compensation.experts import fit_bytes
from camera.evaluation.suite import Measures, Passenger
from camera.method import METHODS, Method
from camera.pipeline.compression import Job
from camera.pipeline.passes.dense import Measurement
from camera.pipeline.publish import finish
from camera.pipeline.result import CompressionResult, versions
from camera.runtime import distributed
from camera.runtime.errors import CameraError
from camera.runtime.files import require_space
from camera.runtime.peak_memory import PeakMemory
from camera.runtime.progress import gigabytes
from camera.streaming.settings import Memory
from camera.streaming.skeleton import Skeleton
from camera.streaming.streamer import Streamer

log = logging.getLogger("camera")
PROPAGATE = ("compressed", "dense")


def compress(
    model: str | Path,
    method: Method | str,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    propagate: str = "compressed",
    data: str = "hub",
    seed: int = 1234,
    device: str = "auto",
    dtype: str = "auto",
    statistics: str | Path | None = None,
    memory: Memory | None = None,
    measures: Measures | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> CompressionResult:
    """Compress a model, one layer in memory at a time, into the folder `out`.

    `method` is a method or the name of one, which then takes `settings` (`sparsity=0.4`, ...).
    With `propagate="compressed"` each layer is measured on what the compressed layers before it
    put out; with `"dense"` on the original model's activations, in one pass that is kept in the
    folder `statistics` and serves every other alpha and sparsity (methods that rank all layers
    together or need gradients always do that). `memory` says what is kept in it. `measures` are
    taken on the way, while a layer is in memory, and stand in evaluation.json (not where a killed
    run goes on). `name` is what model card and report call the base model (default: its hub id, or
    the name of its folder). `progress` shows a bar, or where there is no terminal a line a minute
    in the log (logger `camera`, level INFO). Raises CameraError for what a user can mend; `out`
    appears only when it is complete.
    """
    method, out = as_method(method, settings), Path(out)
    if propagate not in PROPAGATE:
        raise CameraError(f"propagate={propagate} is none of {', '.join(PROPAGATE)}.")
    if out.exists():
        raise CameraError(f"{out} exists already: delete it or choose another folder.")
    if not method.compresses:
        raise CameraError(f"method {method.name} leaves the model as it is: nothing to do.")
    folder = resolve_model(str(model), code=trust_remote_code)
    streamer = Streamer(folder, resolve_device(device), dtype, trust_remote_code)
    method.check(streamer.budget)
    name = name or (Path(model).absolute().name if Path(model).is_dir() else str(model))

    job = Job(name, streamer, method, out, show_progress=progress)
    if method.reads_text:
        tokens = calibration_tokens(
            load_tokenizer(folder, trust_remote_code),
            calibration or Calibration(),
            data=data,
            seed=seed,
            max_length=getattr(streamer.config, "max_position_embeddings", None),
        )
        job.calibration = Measurement(name, streamer, method, tokens, job.each_layer)
    if measures is not None and distributed.rank() == 0:
        job.passenger = Passenger(streamer, load_tokenizer(folder, trust_remote_code), measures)
    budget = streamer.budget
    holds = method.holds(budget)
    if method.compensation:
        tables, dense = (job.tokens, budget.hidden), method.compensation.target == "dense"
        holds += max(
            fit_bytes(*tables, pool.widths, streamer.dtype.itemsize, dense)
            for pool in budget.layers.values()
        )
    job.needs = streamer.prepare(
        memory or Memory(),
        job.tokens,
        method.slices,
        out.parent,
        holds=holds,
        backward=method.backward,
        asks_head=method.asks_head,
    )
    log.info("%s: this takes %s", out.name, job.needs)
    if method.compensation and not job.needs.keep_phi:
        raise CameraError(
            f"compensate={method.compensation.scope} needs the {gigabytes(job.needs.phi)} that a "
            "layer's micro-experts put out: set memory.phi=keep and memory.experts=ram, or "
            "calibrate on fewer tokens."
        )
    require_space(out.parent, job.bytes_to_come())
    with PeakMemory(streamer.device) as job.memory:
        tokens_pass = None
        if method.calibrates:
            once = method.one_shot or propagate == "dense"
            if once and (method.one_shot or method.storable):
                job.measure_once(Path(statistics) if statistics else None)
            if not once or not method.storable:
                tokens_pass = propagate
        elif method.one_shot:
            job.weigh()
        if method.compensation:
            tokens_pass = "compressed"
        job.compress_layers(tokens_pass)
        result = finish(job)
    log.info("%s: this took %s", out.name, gigabytes(job.memory.added))
    return result


def describe(model: str | Path, trust_remote_code: bool = False) -> CompressionResult:
    """What `compress` would report of the original model: its counts, with nothing removed."""
    folder = resolve_model(str(model), code=trust_remote_code)
    skeleton = Skeleton(folder, trust_remote_code=trust_remote_code)
    dense, size = skeleton.budget.dense, skeleton.reader.bytes
    return CompressionResult(
        method="dense",
        model=str(model),
        settings={},
        sparsity={"asked": 0.0, "of": None, **dense.sparsity(dense)},
        bits=dict.fromkeys(("raw", "stored", "model"), 8 * dense.bytes / dense.model),
        bytes={"dense": size, "compressed": size},
        seconds={"calibrate": 0.0, "compress": 0.0},
        versions=versions(),
    )


def as_method(method: Method | str, settings: dict[str, Any]) -> Method:
    """A method from its name and settings; CameraError for an unknown name or setting."""
    if isinstance(method, Method):
        if settings:
            raise CameraError(
                f"settings {', '.join(settings)} can only be given with the name of a method: "
                "this one has its own."
            )
        return method
    if method not in METHODS:
        raise CameraError(f"method={method} is none of {', '.join(sorted(METHODS))}.")
    try:
        return METHODS[method](**settings)
    except TypeError as error:
        raise CameraError(f"method {method}: {error}.") from error
