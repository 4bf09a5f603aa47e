"""The end of a compression: what stands outside the layers, config, reports; the folder appears."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from typing import Any

from camera.checkpoint.config import MODULES, CameraConfig, auto_class, modules_key, save_config
from camera.checkpoint.shards import ShardWriter
from camera.checkpoint.source import copy_companions
from camera.method import Plan
from camera.pipeline.context import PassContext
from camera.pipeline.model_card import model_card
from camera.pipeline.passes.compressed import CompressedPass
from camera.pipeline.result import CompressionResult, report, super_experts
from camera.pipeline.resume import PassProgress
from camera.runtime import distributed
from camera.runtime.errors import CameraError
from camera.runtime.files import CheckpointFiles, replace_durably, write_json
from camera.streaming.meta_build import tied_names
from camera.streaming.skeleton import MetaModel

log = logging.getLogger("camera")


def publish(
    context: PassContext, done: CompressedPass, progress: PassProgress, writer: ShardWriter
) -> CompressionResult:
    """Write what lies outside the layers, config, plan and reports; then the folder appears."""
    request = context.request
    distributed.barrier()  # no process writes to the folder any more
    if distributed.rank() > 0:
        distributed.barrier()
        stored = json.loads((request.out / CheckpointFiles.REPORT).read_text())
        return CompressionResult(**stored)
    partial = request.partial
    for listener in done.listeners:
        write_json(partial / CheckpointFiles.EVALUATION, listener.results(context.memory.bytes))
    with context.state.timed("compress"):
        _write_rest(context, done, writer)
        _write_config(context, done.plan, writer)
        copy_companions(context.streamer.model.folder, partial)
        _plan(context, done.plan).save(partial / CheckpointFiles.PLAN)
        if done.statistics is not None and done.statistics.travels:
            done.statistics.save(partial / CheckpointFiles.STATISTICS)
    result = report(context, done.statistics, writer)
    loader = auto_class(context.streamer.model.config).__name__
    (partial / "README.md").write_text(model_card(result, loader))
    write_json(partial / CheckpointFiles.REPORT, result.to_dict())
    _read_back(context)
    progress.finish()
    replace_durably(partial, request.out)
    shutil.rmtree(request.private_statistics, ignore_errors=True)
    distributed.barrier()
    return result


def _plan(context: PassContext, plan: Plan) -> Plan:
    """The plan, with the super experts of the model that it was made for, where there are any."""
    found = super_experts(context)
    return replace(plan, shared=plan.shared | {"super_experts": found}) if found else plan


def _write_rest(context: PassContext, done: CompressedPass, writer: ShardWriter) -> None:
    model = context.streamer.model
    model.load_rest()
    tied = tied_names(model.model)
    rest = model.take_out(model.model)
    done.add(len(model.layers), {n: t for n, t in rest.items() if n not in tied})
    if context.method.native:
        writer.close()
    else:
        writer.close(**{MODULES: modules_key(_modules(context))})


def _modules(context: PassContext) -> dict[str, Any]:
    before = context.streamer.model.compressed
    return {**({} if before is None else before.modules), **context.state.modules}


def _write_config(context: PassContext, plan: Plan, writer: ShardWriter) -> None:
    model, method = context.streamer.model, context.method
    config, stored = model.config, None
    if model.kept is not None:
        stored = model.kept.quantisation(writer.weight_map)
        if stored is None:
            log.warning("%s: nothing stays as its source stored it.", context.request.out.name)
    if method.native:
        for key, value in method.native_config(config, context.budget, plan).items():
            setattr(model.text_config, key, value)
        if stored is not None:
            config.quantization_config = stored
    else:
        made_by: dict[str, Any] = {"method": method.name, **method.settings()}
        config.quantization_config = CameraConfig(_modules(context), made_by, source=stored)
    config.architectures = [type(model.model).__name__]
    config.dtype = model.stored_dtype
    if type(model.model).__module__.startswith(("transformers.", "camera.")):
        vars(config).pop("auto_map", None)  # no code of the source's is needed any more
    save_config(config, context.request.partial)


def _read_back(context: PassContext) -> None:
    """CameraError unless the written folder is, by its config and headers, the whole model."""
    model, partial = context.streamer.model, context.request.partial
    fix = f"delete {partial} and run again, or report it if that doesn't help"
    try:
        written = MetaModel(partial, trust_remote_code=model.trust_remote_code)
    except CameraError as error:
        raise CameraError(f"what was written is no whole checkpoint ({error}): {fix}.") from error
    for name in written.reader.left_out:
        if model.kept is not None and model.kept.holds(name):
            continue  # scales of activations, beside what is kept as it was stored
        raise CameraError(f"what was written holds tensor '{name}', which has no use: {fix}.")
    tied = tied_names(written.model)
    for name, tensor in written.model.state_dict().items():
        found, asked = written.dtype_on_disk(name), model.dtype_on_disk(name)
        if tensor.is_floating_point() and name not in tied and found != asked:
            raise CameraError(
                f"tensor '{name}' was written as {found} instead of {asked}: {fix}.".replace(
                    "torch.", ""
                )
            )
