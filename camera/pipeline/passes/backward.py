"""Gradients in one layer's memory: forward layer by layer, then back the same way.

On the way forward every layer's input goes to disk. On the way back a layer is loaded, run again
from there with gradients, and freed; of the whole graph never more than one layer exists.

The loss is that of each sample by itself: the mean cross entropy of its next tokens, so that what
is gathered does not depend on how samples are batched. A batch's mean loss has these gradients
divided by its number of samples.

Shapes: B samples of a batch, L tokens of a sample, T = B * L tokens, H hidden, V vocabulary,
N samples of the calibration set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

from camera.calibration.experts.super_experts import WithOutliers
from camera.calibration.observers import ObserverSpec
from camera.calibration.statistics import LayerStatistics, Statistics
from camera.checkpoint.shards import write_tensors
from camera.method import Pass, Seen
from camera.moe.gradients import backpropagate
from camera.pipeline.cache import gathered_once
from camera.pipeline.context import PassContext
from camera.pipeline.passes.dense import noted, regrouped
from camera.pipeline.resume import PassProgress
from camera.runtime import distributed
from camera.runtime.device.finite import all_finite
from camera.runtime.errors import CameraError
from camera.runtime.files import partial_of, replace_durably, require_space
from camera.runtime.progress import EachLayer
from camera.streaming.batches import Arguments, LayerInput
from camera.streaming.lm_head import lm_head_loaded, logits, tokens_per_chunk
from camera.streaming.memory import BACKWARD_TOKENS
from camera.streaming.streamer import LayerStreamer


class BackwardPass:
    """Gathers statistics of gradients in one forward and one backward way through the layers.

    The layers' inputs take tokens * H * (layers + 1) numbers on disk, in the model's precision.
    Raises CameraError if the disk is too small, for float16, and for gradients that are not finite.
    """

    def __init__(self, context: PassContext):
        self._context = context

    def run(self, step: Pass, seen: Seen) -> dict[int, LayerStatistics]:
        """Statistics of every layer of the pool."""
        context, spec = self._context, step.observer

        def gather(progress: PassProgress, folder: Path) -> Statistics:
            streamer = context.streamer
            if streamer.model.dtype == torch.float16:
                raise CameraError(
                    "gradients vanish in float16: set dtype=bfloat16 or dtype=float32 for this "
                    "method."
                )
            progress.restore()
            parts = context.ids_NL.split(context.batch_size(BACKWARD_TOKENS))
            state = noted(progress.state)
            shown = context.watched(spec, BACKWARD_TOKENS, state)
            way = BackwardWay(streamer, [{"input_ids": ids} for ids in parts], folder)
            layers = way.run(shown, context.each_layer, progress, state)
            return Statistics(layers, context.about("dense") | noted(state))

        found = gathered_once(context, spec.key(), spec.statistics, type(spec), gather)
        context.recall(found.about)
        return found.layers


class BackwardWay:
    """Batches on their way through a streamed model and back.

    `folder` holds the layers' inputs; a restored `progress` goes on where a killed run stopped.
    """

    def __init__(
        self, streamer: LayerStreamer, inputs: list[dict[str, torch.Tensor]], folder: Path
    ):
        self.streamer, self.inputs = streamer, inputs
        self.gradients: list[torch.Tensor] = []  # [B, L, H] per batch, dloss/d(hidden states)
        self._store = _Inputs(folder, [len(batch["input_ids"]) for batch in inputs])
        self._batches: list[LayerInput] = []
        self._arguments: list[Arguments] = []

    def run(
        self,
        spec: ObserverSpec | WithOutliers,
        each_layer: EachLayer,
        progress: PassProgress,
        state: dict[str, Any] | None = None,
    ) -> dict[int, LayerStatistics]:
        """Forward and back; every layer of the pool is shown to an observer of its own.

        `state`, which observers may add to, is kept with the progress.
        """
        state = {} if state is None else state
        layers, pool = len(self.streamer.model.layers), self.streamer.model.budget.layers
        self.start(progress.done)
        for index in each_layer("forward", min(progress.done, layers)):
            self.forward(index)
            progress.commit(index + 1, state, [])
        self._batches = []
        if progress.done > layers:
            self.gradients = regrouped(progress.hidden(), self._store.sizes)
        else:
            self.head()
        for step in each_layer("backward", progress.done - layers):
            index, seen = layers - 1 - step, None
            if index >= min(pool):  # nothing below is asked for
                seen = self.back(index, spec if index in pool else None)
            progress.commit(layers + step + 1, state, self.gradients, seen)
            # of several processes one may be a layer behind when they are killed
            self._store.drop_from(index if distributed.world() == 1 else index + 2)
        distributed.barrier()  # all statistics are on the disk
        # progress counts 2 * layers steps, a layer's statistics stand at its step back
        found = progress.statistics().items()
        return {2 * layers - 1 - step: seen for step, seen in sorted(found, reverse=True)}

    def start(self, done: int = 0) -> None:
        """Embed the batches; with `done` layers, take what an earlier run left of them."""
        layers = len(self.streamer.model.layers)
        batches = self.streamer.embed(self.inputs)
        self._arguments = [batch.arguments for batch in batches]
        if done == 0:
            hidden = [batch.hidden_BLH for batch in batches]
            size = sum(h.numel() * h.element_size() for h in hidden)
            require_space(self._store.folder, size * (layers + 2))
            self._store.put(0, hidden)
        elif done < layers:
            batches = [
                LayerInput(arguments, self._store.get(done, i))
                for i, arguments in enumerate(self._arguments)
            ]
        self._batches = batches

    def forward(self, index: int) -> None:
        """Run one layer over all batches; the next one's inputs go to disk."""
        streamer = self.streamer
        streamer.load_layer(index)
        inputs = streamer.attend(index, self._batches)
        self._batches = streamer.forward(index, inputs)
        streamer.model.free_layer(index)
        self._store.put(index + 1, [batch.hidden_BLH for batch in self._batches])

    def head(self) -> None:
        """Gradients of every sample's loss at the last layer's output."""
        model = self.streamer.model
        last = len(model.layers)
        self.gradients = []
        with lm_head_loaded(model) as vocabulary:
            rows = tokens_per_chunk(vocabulary, tables=6)
            for i, arguments in enumerate(self._arguments):
                hidden_BLH = self._store.get(last, i)
                ids_BL, mask_T = self.inputs[i]["input_ids"], arguments.mask_T
                target_T, weight_T = next_tokens(ids_BL, mask_T)
                chunks = zip(
                    hidden_BLH.flatten(0, 1).split(rows),
                    target_T.split(rows),
                    weight_T.split(rows),
                    strict=True,
                )
                gradient = torch.cat([self._head(*chunk) for chunk in chunks])
                self.gradients.append(_finite(gradient, "the head").view_as(hidden_BLH))

    def back(
        self, index: int, spec: ObserverSpec | WithOutliers | None = None
    ) -> LayerStatistics | None:
        """Gradients at a layer's output become those at its input; what `spec` saw of its FFN."""
        model = self.streamer.model
        layer, ffn, device = (
            self.streamer.load_layer(index),
            model.feed_forward(index),
            model.device,
        )
        if isinstance(spec, WithOutliers):
            spec.stream(index, [self._store.get(index, 0)] if self._arguments else [])
        observer = None if spec is None else spec.build(index, ffn)
        for i, arguments in enumerate(self._arguments):
            gradient = backpropagate(
                layer,
                ffn,
                self._store.get(index, i).to(device),
                arguments.kwargs[index],
                self.gradients[i].to(device),
                observer,
                None if arguments.mask_T is None else arguments.mask_T.to(device),
                batch=i,
            )
            self.gradients[i] = _finite(gradient, f"layer {index}").cpu()
        seen = None
        if spec is not None:
            seen = spec.finish(observer.result().all_reduced(), ffn).stored()
        model.free_layer(index)
        return seen

    def _head(
        self, hidden_TH: torch.Tensor, target_T: torch.Tensor, weight_T: torch.Tensor
    ) -> torch.Tensor:
        """Gradients of some tokens' hidden states, through the model's own norm and head."""
        model = self.streamer.model
        with torch.enable_grad():
            leaf_TH = hidden_TH.to(model.device).requires_grad_()
            logits_TV = logits(model, leaf_TH)
            nll_T = F.cross_entropy(logits_TV, target_T.to(model.device), reduction="none")
            loss = (nll_T * weight_T.to(model.device)).sum()
        return torch.autograd.grad(loss, leaf_TH)[0].cpu()


def next_tokens(
    ids_BL: torch.Tensor, mask_T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """target_T of every token and its weight in its sample's loss: 1 / (targets of the sample).

    The weight is 0 where there is no next token, and where either of the two is padding.
    """
    real_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    if mask_T is not None:
        real_BL = mask_T.view_as(ids_BL)
    weight_BL = torch.zeros(ids_BL.shape)
    weight_BL[:, :-1] = (real_BL[:, :-1] & real_BL[:, 1:]).float()
    weight_BL /= weight_BL.sum(1, keepdim=True).clamp(min=1)
    return ids_BL.roll(-1, 1).flatten(), weight_BL.flatten()


class _Inputs:
    """Every layer's inputs on disk, a file per layer and a tensor per batch.

    `sizes` are the samples of each batch that is asked for; those that were put may differ.
    """

    def __init__(self, folder: Path, sizes: list[int]):
        self.folder, self.sizes = folder, sizes
        self._rank = f"-{distributed.rank()}" if distributed.rank() else ""
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, index: int, hidden: list[torch.Tensor]) -> None:
        path = self._path(index)
        partial = partial_of(path)
        try:
            write_tensors({str(i): h for i, h in enumerate(hidden)}, partial)
            replace_durably(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise CameraError(
                f"can't write {path} ({error}): free space on that disk, then run the same command "
                "again to go on from here."
            ) from error

    def get(self, index: int, batch: int) -> torch.Tensor:
        path, first = self._path(index), sum(self.sizes[:batch])
        found, start = [], 0
        try:
            with safe_open(path, "pt") as file:
                for key in sorted(file.keys(), key=int):
                    part = file.get_slice(key)
                    size = part.get_shape()[0]
                    begin, end = max(first - start, 0), first + self.sizes[batch] - start
                    if begin < size and end > 0:
                        found.append(part[begin : min(end, size)])
                    start += size
            return found[0] if len(found) == 1 else torch.cat(found)
        except (OSError, SafetensorError) as error:
            raise CameraError(
                f"{path} can't be read ({error}): delete its folder and run the same command again."
            ) from error

    def drop_from(self, index: int) -> None:
        for path in self.folder.glob(f"input-?????{self._rank}.safetensors"):
            if path >= self._path(index):
                path.unlink()

    def _path(self, index: int) -> Path:
        return self.folder / f"input-{index:05d}{self._rank}.safetensors"


def _finite(gradient: torch.Tensor, place: str) -> torch.Tensor:
    if not all_finite(gradient):
        raise CameraError(
            f"gradients at {place} hold NaN or inf: check the weights, or run with dtype=float32."
        )
    return gradient
