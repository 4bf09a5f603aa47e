"""Calibration: the tokens' way through a streamed model, and the statistics gathered on it."""

import copy
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from camera.calibration.statistics import LayerStatistics, Statistics, add_up
from camera.calibration.tokens import CalibrationTokens
from camera.calibration.trials import LayerCuts, Trials
from camera.checkpoint.source import fingerprint
from camera.compensation.experts import Weights
from camera.method import Method
from camera.moe.pool import Kept
from camera.pipeline.passes import backward
from camera.pipeline.passes.trial import measure
from camera.pipeline.result import versions
from camera.pipeline.resume import Progress, code_version
from camera.runtime import distributed
from camera.runtime.files import content_key
from camera.runtime.progress import EachLayer
from camera.streaming.batches import Batch
from camera.streaming.memory import BATCH_TOKENS
from camera.streaming.streamer import Streamer


class Measurement:
    """Calibration tokens on their way through a model, measured layer by layer."""

    def __init__(
        self,
        model: str,
        streamer: Streamer,
        method: Method,
        tokens: CalibrationTokens,
        each_layer: EachLayer,
    ):
        self.model, self.streamer, self.method, self.tokens = model, streamer, method, tokens
        self.mine = replace(tokens, ids_NL=distributed.share(tokens.ids_NL))  # this process's share
        self.each_layer = each_layer
        self.batches: list[Batch] = []
        self.dense: list[Batch] | None = None  # the dense model's, where compensation aims at them

    def about(self, propagate: str) -> dict:
        """What statistics were gathered on, for their file."""
        return {
            "model": self.model,
            "propagate": propagate,
            "calibration": self.tokens.describe(),
            "versions": versions(),
        }

    def start(self, progress: Progress, *, compensates: bool) -> None:
        """Embed the tokens; where an earlier run got further, take its hidden states. A pass that
        `compensates` takes the dense model's tokens along, where these are aimed at."""
        ids_NL = self.mine.ids_NL
        size = max(1, BATCH_TOKENS // ids_NL.shape[1])
        self.batches = self.streamer.embed({"input_ids": ids} for ids in ids_NL.split(size))
        how = self.method.compensation
        self.dense = None
        if compensates and how is not None and how.target == "dense":
            self.dense = [copy.copy(batch) for batch in self.batches]
        if progress.done:
            everything = [*self.batches, *(self.dense or [])]
            for batch, hidden_BLH in zip(everything, progress.hidden(), strict=True):
                batch.hidden_BLH = hidden_BLH

    def hidden(self) -> list:
        """The inputs of the layer that comes next."""
        return [batch.hidden_BLH for batch in [*self.batches, *(self.dense or [])]]

    def measure(
        self, index: int, *, propagate: bool = False, trace: bool = False
    ) -> LayerStatistics:
        """What the method sees of a loaded layer whose attention has run."""
        observer = self.method.observer(index, self.streamer.feed_forward(index))
        self.streamer.observe(index, self.batches, observer, propagate=propagate, trace=trace)
        return add_up(observer.result())

    def trace(self, index: int) -> None:
        """Keep what a loaded layer's micro-experts put out, and measure nothing."""
        self.streamer.observe(index, self.batches, trace=True)

    def compensate(self, index: int, kept: Kept, before: Weights) -> dict[str, Any]:
        """Refit a cut layer to what it put out `before`; what that did."""
        how = self.method.compensation
        return self.streamer.compensate(index, self.batches, kept, before, how, self.dense)

    def attend(self, index: int) -> dict[str, Any]:
        """Run a loaded layer up to its FFN. Where the dense model is aimed at, its tokens run
        through all of it, and attention is refitted; what that did."""
        streamer = self.streamer
        if self.dense is None:
            streamer.attend(index, self.batches)
            return {}
        streamer.attend(index, self.dense)
        how = self.method.compensation
        report = streamer.attend_refitted(index, self.batches, self.dense, how)
        streamer.observe(index, self.dense, propagate=True)
        return {"attention": report}

    def propagate(self, index: int, kept: Kept | None = None) -> None:
        """Finish a layer as it now is."""
        self.streamer.propagate(index, self.batches, kept)

    def dense_statistics(self, folder: Path) -> Statistics:
        """Statistics of the original model: read from `folder` if gathered before, else gathered.

        Methods that see the same things of the same model and tokens share a file.
        """
        return self._once(folder, self.method.statistics_key(), self._measure_dense)

    def cuts(self, trials: Trials, folder: Path) -> Statistics:
        """What each of these cuts costs the original model, read or gathered likewise."""
        plans = sha256()
        for index in sorted(trials):
            plans.update(torch.stack(trials[index]).numpy().tobytes())
        key = {"kind": LayerCuts.kind, "tokens": trials.TOKENS, "plans": plans.hexdigest()}

        def gather(progress: Progress, folder: Path) -> Statistics:
            ids_NL = trials.trial_tokens(self.mine.ids_NL, distributed.world())
            found = measure(self.streamer, ids_NL, trials, self.each_layer)
            distributed.barrier()
            return Statistics({i: add_up(found[i]) for i in found}, self.about("dense"))

        return self._once(folder, key, gather)

    def _once(
        self,
        folder: Path,
        key: dict[str, Any],
        gather: Callable[[Progress, Path], Statistics],
    ) -> Statistics:
        streamer = self.streamer
        about = {
            "weights": fingerprint(streamer.folder),
            "tokens": self.tokens.hash,
            "dtype": str(streamer.dtype),
            "statistics": key,
            **code_and_device(streamer, _watcher(type(self.method))),
        }
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{streamer.config.model_type}-{key['kind']}-{content_key(about)}"
        path = folder / f"{name}.safetensors"
        first = distributed.rank() == 0
        with FileLock(f"{path}.lock") if first else nullcontext():  # a sweep's jobs measure once
            if not distributed.least(path.exists()):
                progress = Progress(folder / f".{name}" / "progress", about)
                found = gather(progress, folder / f".{name}")
                if first:
                    partial = folder / f".{name}.partial"
                    found.save(partial)
                    os.replace(partial, path)
                progress.clear()
        return Statistics.load(path)

    def _measure_dense(self, progress: Progress, folder: Path) -> Statistics:
        progress.restore()
        if self.method.backward:
            return Statistics(self._measure_backward(progress, folder), self.about("dense"))
        self.start(progress, compensates=False)
        streamer = self.streamer
        for i in self.each_layer("measure", progress.done):
            streamer.load_layer(i)
            self.attend(i)
            seen = None
            if i in streamer.budget.layers:
                seen = self.measure(i, propagate=True).stored()
            else:
                self.propagate(i)
            streamer.free(streamer.layers[i])
            progress.commit(i + 1, {}, self.hidden(), seen)
        distributed.barrier()  # rank 0 writes what all read
        return Statistics(progress.statistics(), self.about("dense"))

    def _measure_backward(self, progress: Progress, folder: Path) -> dict[int, LayerStatistics]:
        return backward.measure(
            self.streamer, self.mine, self.method.observer, self.each_layer, progress, folder
        )


def _watcher(method: type[Method]) -> type:
    """The class that says what looks at a layer: methods that inherit it see the same things."""
    return next(owner for owner in method.__mro__ if "observer" in vars(owner))


def code_and_device(streamer: Streamer, owner: type) -> dict[str, str]:
    """What else than the inputs decides the bytes of a result of this class's code."""
    own = Path(inspect.getfile(owner))
    package = sys.modules[owner.__module__.partition(".")[0]]
    if hasattr(package, "__path__"):
        own = Path(package.__file__)
    files = sorted(own.parent.rglob("*.py")) if hasattr(package, "__path__") else [own]
    return {"code": code_version(*files), "device": streamer.device.type}
