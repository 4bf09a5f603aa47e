"""One compression: the loop over the passes that a method declares."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch
from huggingface_hub.errors import StrictDataclassError

from camera.checkpoint.formats.format import FORMATS
from camera.checkpoint.loading import require_finite
from camera.checkpoint.shards import ShardWriter
from camera.checkpoint.source import fingerprint
from camera.method import Method, Pass, PassKind
from camera.moe.budget import Budget
from camera.pipeline.cache import computed_by, tokens_key
from camera.pipeline.context import CompressionRequest, PassContext
from camera.pipeline.memory.estimate import MemoryEstimate
from camera.pipeline.memory.refusal import require_memory
from camera.pipeline.passes.backward import BackwardPass
from camera.pipeline.passes.compressed import CompressedPass
from camera.pipeline.passes.dense import DensePass
from camera.pipeline.passes.trial import TrialPass
from camera.pipeline.passes.weights import WeightsPass
from camera.pipeline.publish import publish
from camera.pipeline.result import CompressionResult
from camera.pipeline.resume import PassProgress
from camera.runtime import distributed
from camera.runtime.device.peak_memory import PeakMemory
from camera.runtime.errors import CameraError
from camera.runtime.files import require_space
from camera.runtime.progress import format_bytes
from camera.streaming.memory import BATCH_TOKENS
from camera.streaming.settings import MemoryChoices
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer, Placement

log = logging.getLogger("camera")

RUNNERS = {
    PassKind.WEIGHTS: WeightsPass,
    PassKind.DENSE: DensePass,
    PassKind.BACKWARD: BackwardPass,
    PassKind.TRIAL: TrialPass,
}


def run(request: CompressionRequest, model: MetaModel, memory: MemoryChoices) -> CompressionResult:
    """Run the passes of the request's method (or of its plan) over a model, and publish.

    Where a device runs out of memory, the run goes on from its last layer with half the batch.
    Raises CameraError for what can't be done, before any weight is read.
    """
    halvings = 0
    while True:
        try:
            return _run(request, model, memory, halvings)
        except torch.OutOfMemoryError as error:
            _require_smaller(request, model, halvings, error)
        halvings += 1
        log.warning(
            "%s: %s is out of memory: going on with batches of %d tokens.",
            request.out.name,
            model.device,
            BATCH_TOKENS >> halvings,
        )
        model = model.reopened()
        request = replace(request, listeners=())  # they look at the model that is gone


def _require_smaller(
    request: CompressionRequest, model: MetaModel, halvings: int, error: torch.OutOfMemoryError
) -> None:
    """CameraError where no smaller batch helps."""
    length = 0 if request.tokens is None else request.tokens.ids_NL.shape[1]
    if length and BATCH_TOKENS >> halvings > length and distributed.world() == 1:
        return
    raise CameraError(
        f"{model.device} is out of memory, and batches can't be smaller: set memory.hidden=ram, "
        "memory.phi=recompute or memory.experts=disk, or take a device with more memory."
    ) from error


def _run(
    request: CompressionRequest, model: MetaModel, memory: MemoryChoices, halvings: int
) -> CompressionResult:
    budget, method = model.budget, request.method
    passes = declared_passes(request, budget)
    refuse_unshared(passes, method)
    samples, length = (0, 0) if request.tokens is None else request.tokens.ids_NL.shape
    estimate = foresee(request, model, memory, samples, length)
    log.info("%s: this takes %s", request.out.name, estimate)
    require_plain_outputs(model)
    require_writable_config(model)
    require_finite(model.reader)
    spill = request.out.parent if estimate.hidden_on_disk else None
    placement = Placement(estimate.experts_on_disk, estimate.hidden_place, spill)
    streamer = LayerStreamer(model, placement)
    with PeakMemory(model.device) as peak:
        context, seen = PassContext(request, streamer, estimate, peak, halvings=halvings), {}
        if request.listener is not None:
            request.listener.begin()
        for step in passes[:-1]:
            with context.state.timed("calibrate"):
                seen[step.kind] = RUNNERS[step.kind](context).run(step, seen)
            context.mark_super_experts()
        plan = request.plan or method.plan(seen, budget)
        made_for = {"model_type": budget.model_type, "hidden_size": budget.hidden}
        plan = replace(plan, model=made_for)
        progress = PassProgress(request.partial / "progress", _fingerprint(context, passes[-1]))
        writer = ShardWriter(request.partial, len(model.layers) + 1)
        last = CompressedPass(context, progress, writer)
        last.run(passes[-1], seen, plan)
        result = publish(context, last, progress, writer)
    where = "on top of the process itself"
    if estimate.device is not None:
        where = f"on the device and {format_bytes(peak.host_added)} of the system's memory"
    took = f"{format_bytes(peak.added)} {where}"
    log.info("%s: this took %s", request.out.name, took)
    return result


def foresee(
    request: CompressionRequest, model: MetaModel, memory: MemoryChoices, samples: int, length: int
) -> MemoryEstimate:
    """What a run over so many samples of so many tokens takes, before any of it is spent.

    CameraError for more memory or disk than is free.
    """
    method, passes = request.method, declared_passes(request, model.budget)
    share = len(range(distributed.rank(), samples, distributed.world()))
    estimate = MemoryEstimate.of(model, method, passes, memory, share * length, length)
    if method.compensation and estimate.phi_kept != "all":
        raise CameraError(
            f"compensate={method.compensation.scope} needs the {format_bytes(estimate.phi)} of a "
            "layer's activations: set memory.phi=keep and memory.experts=ram, or calibrate on "
            "fewer tokens."
        )
    require_memory(estimate, method, model.device, samples * length, samples)
    require_space(request.out.parent, bytes_to_come(request, model, estimate, passes))
    return estimate


def declared_passes(request: CompressionRequest, budget: Budget) -> tuple[Pass, ...]:
    """The passes that the method declares; of a given plan those that applying it takes."""
    if request.plan is not None:
        return request.method.passes_of_plan(budget, request.propagate)
    return request.method.passes(budget, request.propagate)


def require_plain_outputs(model: MetaModel) -> None:
    """CameraError for a checkpoint whose layers put out constants beside what experts compute."""
    for path, spec in getattr(model.compressed, "modules", {}).items():
        if FORMATS[spec["form"]].holds_constants:
            raise CameraError(
                f"experts at {path} are replaced by constants, and what holds them can't be "
                "compressed further: start from the original."
            )


def require_writable_config(model: MetaModel) -> None:
    """CameraError for a config.json that transformers reads but doesn't write."""
    with TemporaryDirectory() as folder:
        try:
            model.config.save_pretrained(folder)
        except (TypeError, ValueError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise CameraError(
                f"{model.folder / 'config.json'} can't be written by transformers, as the "
                f"compressed model's must be: {reason}; fix that key."
            ) from error


def refuse_unshared(passes: Sequence[Pass], method: Method) -> None:
    """CameraError, under torchrun, for statistics that don't add up over processes."""
    if distributed.world() == 1:
        return
    for step in passes:
        reason = None if step.observer is None else step.observer.single_process()
        if reason is not None:
            raise CameraError(f"method {method.name}: {reason}: start it without torchrun.")


def bytes_to_come(
    request: CompressionRequest,
    model: MetaModel,
    estimate: MemoryEstimate,
    passes: Sequence[Pass],
) -> int:
    """What a run may still write: the dense size, less what a killed run wrote already, and the
    hidden states that it keeps there."""
    written = sum(path.stat().st_size for path in request.partial.glob("*.safetensors"))
    tables = 2 + (estimate.tables if estimate.hidden_on_disk else 0)
    if any(step.kind == PassKind.BACKWARD for step in passes):
        tables += len(model.layers)  # every layer's input waits for the way back
    left = max(model.budget.dense.bytes - written, 0)
    return left + tables * estimate.hidden


def _fingerprint(context: PassContext, step: Pass) -> dict[str, object]:
    """What decides the bytes of a compressed pass."""
    request, model = context.request, context.streamer.model
    settings = {
        "weights": fingerprint(model.folder),
        "method": request.method.name,
        **request.method.settings(),
        "calibration": tokens_key(request.tokens) if request.tokens else None,
        "propagate": step.feed if step.tokens else "dense",
        "plan_given": request.plan is not None,
        "phi_kept": context.estimate.phi_kept,
        "experts_on_disk": context.estimate.experts_on_disk,
        "dtype": str(model.dtype),
        "stored_dtype": str(model.stored_dtype),
    }
    if model.kept is not None:
        settings["store"] = "source"
    return settings | computed_by(model, type(request.method))
