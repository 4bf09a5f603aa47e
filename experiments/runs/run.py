"""One run: compress, measure, draw, log; each part is a file and, once done, stays done."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from camera.checkpoint.source import resolve_model
from camera.runtime import distributed
from camera.runtime.files import write_json
from experiments.config.constructor import build
from experiments.config.settings import Settings, check
from experiments.figures.run import draw_run
from experiments.records.energy_summary import keep_energies
from experiments.records.failures import FailedBeforeError, naming_output, one_line
from experiments.records.files import (
    COMPRESSION,
    RunFiles,
    is_json,
    is_locked,
    lock_of,
    newer,
    read_json,
)
from experiments.records.folders import Folders
from experiments.records.interruptions import deferred_interruptions
from experiments.records.origin import origin_of
from experiments.runs import ranks
from experiments.runs.compression import (
    camera_compress,
    check_method,
    compression,
    computed_in,
    evaluation_during_compression,
)
from experiments.runs.measurements import (
    lazy_model,
    measured,
    measurements,
    predict_densely,
    stream,
)
from experiments.runs.metrics import assemble
from experiments.runs.summary import check_objective
from experiments.runs.tracker import CarefulTracker
from experiments.runs.tracking import RunTracking, replay
from experiments.tables.layouts.card import enter_scores

log = logging.getLogger("camera")


def run(
    settings: Settings,
    sweep: str | None = None,
    since: float | None = None,
    wait: bool = True,
    preset: str | None = None,
    studies: Sequence[str] = (),
) -> Path:
    """Do what is not done yet of one run and return its folder, which then holds DONE.

    `sweep` groups runs in the tracker, where `preset` is a tag, and leaves alone what failed before
    (FailedBeforeError): `retry=failed` tries again what failed before `since`; a run by itself is
    always tried. `force` redoes what was finished before `since` (default: now), so that jobs of
    one sweep that share a checkpoint don't redo each other's. What is refused before any weight is
    read leaves nothing; what fails is written to the folder's error.txt and raised again,
    CameraError if the user can mend it. A run that another process is doing is waited for, or
    `filelock.Timeout` without `wait`. `studies` are what asks for it, which tables group runs by.
    Under torchrun rank 0 does all that; the other ranks join it where it compresses.
    """
    folders = Folders.of(settings)
    ranks.join()
    if distributed.rank() > 0:
        ranks.follow(partial(camera_compress, settings, folders))
        return folders.run
    with ranks.leading():
        return _run(settings, folders, sweep, since, wait, preset, studies)


def _run(
    settings: Settings,
    folders: Folders,
    sweep: str | None,
    since: float | None,
    wait: bool,
    preset: str | None,
    studies: Sequence[str],
) -> Path:
    if wait and is_locked(folders.run):
        log.info("%s is being done by another process: waiting for it.", folders.run)
    files = folders.files
    folders.check_name()
    if settings.force or not files.is_done:
        check(settings)
        check_objective(settings)
        check_method(settings)
    with lock_of(folders.run).acquire(timeout=-1 if wait else 0):
        since = time.time() if since is None else since
        studies = [*files.studies, *studies]
        if settings.force:
            folders.remove_outputs(before=since)
        if files.is_done:
            files.enter_studies(studies)
            log.info("%s is done already.", folders.run)
            if "WANDB_SWEEP_ID" in os.environ:  # an agent waits for a run of its own
                replay(CarefulTracker(build(settings.tracker)), files)
            return folders.run
        tried = settings.retry == "none" or newer(files.error, since)
        if sweep and tried and (reason := files.failure):
            raise FailedBeforeError(f"failed before: {reason} (retry=failed tries again)")
        asked = {"method": settings.method_name, "settings": settings.to_dict()}
        asked |= {"sweep": sweep, "preset": preset}
        if not settings.compresses:
            asked["origin"] = origin_of(resolve_model(settings.model_path, weights=False))
        begun = None
        if is_json(files.settings):
            begun = read_json(files.settings).get("identity", {}).get("computed")
        files.start(asked | {"identity": folders.identity | {"computed": begun}})
        with _error_file(files), _log_file(files), naming_output(folders.output.folder):
            files.enter_studies(studies)
            computed = computed_in(settings)
            files.start(asked | {"identity": folders.identity | {"computed": computed}})
            if begun not in (None, computed):
                _start_anew(settings, folders, begun)
            tracking = RunTracking(CarefulTracker(build(settings.tracker)), files)
            try:
                metrics = _measure(settings, folders, tracking)
                files.finish(metrics)
                if settings.compresses and settings.keep_checkpoint:
                    enter_scores(folders.checkpoint, metrics)
                tracking.finish(metrics)
            except BaseException as error:
                tracking.fail(one_line(error))  # which raises nothing
                raise
            files.done.touch()
    if not settings.keep_checkpoint:
        folders.discard_checkpoint()
    return folders.run


def _start_anew(settings: Settings, folders: Folders, begun: dict[str, str]) -> None:
    """Forget the parts that were done in other arithmetic."""
    where = "on {device} in {dtype}".format(**begun)
    log.warning("%s was begun %s: doing it anew.", folders.name, where)
    for name in (COMPRESSION, *measurements(settings, folders)):
        folders.files.part(name).unlink(missing_ok=True)


def _measure(settings: Settings, folders: Folders, tracking: RunTracking) -> dict[str, Any]:
    if evaluation_during_compression(settings) is not None and not folders.is_compressed:
        predict_densely(settings, folders, settings.measures())
    makes = partial(compression, settings, folders, tracking)
    said = "compress" if settings.compresses else "the model as it is"
    compressed = _part(folders, COMPRESSION, makes, said)
    tracking.compressed(compressed)
    tracking.figures(_draw(settings, folders))
    results = {}
    stream(settings, folders)
    with lazy_model(settings, folders) as model:
        for name, measure in measurements(settings, folders).items():
            results[name] = _part(folders, name, partial(measured, measure, model))
            tracking.part(name, results[name])
            log.info("%s: %s", name, _headline(results[name]))
    return assemble(settings, compressed, results)


def _part(
    folders: Folders, name: str, make: Callable[[], dict[str, Any]], said: str | None = None
) -> dict[str, Any]:
    file = folders.files.part(name)
    if not is_json(file):
        again = " again, what was written is damaged" if file.exists() else ""
        log.info("%s: %s%s", folders.name, said or name, again)
        write_json(file, make())
    return read_json(file)


def _draw(settings: Settings, folders: Folders) -> list[Path]:
    if folders.statistics.exists():
        keep_energies(folders.statistics, settings.method.get("alpha", settings.alpha), folders.run)
    try:
        return draw_run(folders.run)
    except Exception as error:  # a font, a backend: figures can be drawn again, hours can't
        log.warning("%s: no figures: %s", folders.name, one_line(error))
        return []


def _headline(part: dict[str, Any]) -> str:
    keys = [key for key in ("perplexity", "acc", "acc_norm") if part.get(key) is not None]
    return ", ".join(f"{key} {part[key]:.4g}" for key in keys)


@contextmanager
def _error_file(files: RunFiles) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        try:
            with deferred_interruptions():
                files.fail(one_line(error), traceback.format_exc())
        except OSError as full:  # the reason is raised, and so in the log, all the same
            log.error("%s can't be written: %s", files.error, one_line(full))
        raise


class _LogFile(logging.FileHandler):
    """Says once that it can't be written, instead of a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        log.warning("%s can't be written any more: %s", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        try:
            super().close()
        except OSError as full:  # what it couldn't write it tries once more
            log.warning("%s lacks its end: %s", self.baseFilename, one_line(full))


@contextmanager
def _log_file(files: RunFiles) -> Iterator[None]:
    try:
        handler = _LogFile(files.log, encoding="utf-8")
    except OSError as full:
        log.warning("%s can't be written: %s", files.log, one_line(full))
        yield
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
