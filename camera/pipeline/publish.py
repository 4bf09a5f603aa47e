"""The end of a job: what stands outside the layers, config, reports, and the folder shown whole."""

import json
import os
import shutil
from typing import Any

from camera.checkpoint.config import CameraConfig
from camera.checkpoint.source import copy_companions
from camera.pipeline.compression import Job
from camera.pipeline.model_card import model_card
from camera.pipeline.report import STATISTICS, report
from camera.pipeline.result import CompressionResult
from camera.runtime import distributed
from camera.runtime.files import write_json

REPORT, EVALUATION = "camera.json", "evaluation.json"


def finish(job: Job) -> CompressionResult:
    """Write what is outside the layers, config and reports; then show the folder, complete."""
    distributed.barrier()  # no process writes to the folder any more
    if distributed.rank() > 0:
        distributed.barrier()
        return CompressionResult(**json.loads((job.out / REPORT).read_text()))
    if job.passenger is not None:
        results = job.passenger.results(job.memory.bytes)
        write_json(job.partial / EVALUATION, results)
    with job.timed("compress"):
        _write_rest(job)
        _write_config(job)
        copy_companions(job.streamer.folder, job.partial)
        if job.statistics is not None and job.statistics.travels:
            job.statistics.save(job.partial / STATISTICS)
    result = report(job)
    (job.partial / "README.md").write_text(model_card(result))
    write_json(job.partial / REPORT, result.to_dict())
    job.progress.finish()
    os.replace(job.partial, job.out)
    shutil.rmtree(job.seen, ignore_errors=True)
    distributed.barrier()
    return result


def _write_rest(job: Job) -> None:
    streamer = job.streamer
    streamer.load_rest()
    tied = set(getattr(streamer.model, "all_tied_weights_keys", None) or {})
    rest = streamer.take_out(streamer.model)
    job.add(len(streamer.layers), {n: t for n, t in rest.items() if n not in tied})
    job.writer.close()


def _write_config(job: Job) -> None:
    streamer, method = job.streamer, job.method
    config, model = streamer.config, streamer.model
    if method.native:
        for key, value in method.native_config(config, streamer.budget).items():
            setattr(config, key, value)
    else:
        stored = streamer.compressed
        before = {} if stored is None else stored.modules
        made_by: dict[str, Any] = {"method": method.name, **method.settings()}
        config.quantization_config = CameraConfig(before | job.modules, made_by)
    config.architectures = [type(model).__name__]
    config.dtype = streamer.stored_dtype
    if type(model).__module__.startswith(("transformers.", "camera.")):
        vars(config).pop("auto_map", None)  # no code of the source's is needed any more
    config.save_pretrained(job.partial)
