"""The end of a compression: what stands outside the layers, config, reports; the folder appears."""

from __future__ import annotations

import json
import shutil
from typing import Any

from camera.checkpoint.config import CameraConfig
from camera.checkpoint.shards import ShardWriter
from camera.checkpoint.source import copy_companions
from camera.pipeline.context import PassContext
from camera.pipeline.model_card import model_card
from camera.pipeline.passes.compressed import CompressedPass
from camera.pipeline.result import CompressionResult, report
from camera.pipeline.resume import PassProgress
from camera.runtime import distributed
from camera.runtime.files import CheckpointFiles, replace_durably, write_json
from camera.streaming.skeleton import tied_names


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
        _write_config(context)
        copy_companions(context.streamer.model.folder, partial)
        done.plan.save(partial / CheckpointFiles.PLAN)
        if done.statistics is not None and done.statistics.travels:
            done.statistics.save(partial / CheckpointFiles.STATISTICS)
    result = report(context, done.statistics, writer)
    (partial / "README.md").write_text(model_card(result))
    write_json(partial / CheckpointFiles.REPORT, result.to_dict())
    progress.finish()
    replace_durably(partial, request.out)
    shutil.rmtree(request.private_statistics, ignore_errors=True)
    distributed.barrier()
    return result


def _write_rest(context: PassContext, done: CompressedPass, writer: ShardWriter) -> None:
    model = context.streamer.model
    model.load_rest()
    tied = tied_names(model.model)
    rest = model.take_out(model.model)
    done.add(len(model.layers), {n: t for n, t in rest.items() if n not in tied})
    writer.close()


def _write_config(context: PassContext) -> None:
    model, method = context.streamer.model, context.method
    config = model.config
    if method.native:
        for key, value in method.native_config(config, context.budget).items():
            setattr(config, key, value)
    else:
        before = {} if model.compressed is None else model.compressed.modules
        made_by: dict[str, Any] = {"method": method.name, **method.settings()}
        config.quantization_config = CameraConfig(before | context.state.modules, made_by)
    config.architectures = [type(model.model).__name__]
    config.dtype = model.stored_dtype
    if type(model.model).__module__.startswith(("transformers.", "camera.")):
        vars(config).pop("auto_map", None)  # no code of the source's is needed any more
    config.save_pretrained(context.request.partial)
