"""Text through the layers of a model of which one is in memory.

Shapes: B samples of a batch, L tokens of a sample, H hidden, T = B * L.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from camera.moe.capture import ModuleStub, replaced_submodule, run_ffn, unwrap
from camera.moe.grouped.sinks import OutputSum, PhiProjection, PhiRecord
from camera.moe.observer import Observer
from camera.moe.pool import KeptRows, rows_on
from camera.runtime.buffers import trim_heap
from camera.runtime.device.finite import FiniteCheck
from camera.runtime.errors import CameraError
from camera.runtime.mapped import release_pages
from camera.streaming.batches import Arguments, FfnInput, FfnOutput, FfnPhi, LayerInput
from camera.streaming.disk_experts import DiskExpertsPass
from camera.streaming.hidden_states import HiddenPlace, HiddenStates
from camera.streaming.skeleton import MetaModel

Stage = TypeVar("Stage", FfnInput, FfnPhi, FfnOutput)


@dataclass(frozen=True)
class Placement:
    """Where a run keeps what doesn't fit: routed experts on disk, hidden states between layers on
    the device, in RAM, or on disk in the folder `spill`."""

    experts_on_disk: bool = False
    hidden: HiddenPlace = "ram"
    spill: Path | None = None


class LayerStreamer:
    """Runs batches through a model, layer by layer; stages are values (`camera.streaming.batches`).

    Functions of several batches use their list up, so that no batch is there twice.
    """

    def __init__(self, model: MetaModel, placement: Placement | None = None):
        self.model, self.placement = model, placement or Placement()
        self.hidden = HiddenStates(model.device, self.placement.hidden, self.placement.spill)

    def load_layer(self, index: int) -> nn.Module:
        """Read one decoder layer, and begin to read the next one."""
        return self.model.load_layer(index, self.placement.experts_on_disk)

    @torch.no_grad()
    def embed(self, batches: Iterable[dict[str, torch.Tensor]]) -> list[LayerInput]:
        """Run everything before the first layer; what the model would pass to each layer is kept.

        Embeddings, masks and rotary positions come from the model's own forward, run with layers
        that only record their arguments.
        """
        model = self.model
        model.load_rest("embed_tokens")
        recorders = nn.ModuleList(map(model.recorder, model.layers))
        found, same = [], {}
        with (
            replaced_submodule(model.base, "layers", recorders),
            replaced_submodule(model.base, model.family.final_norm, nn.Identity()),
        ):
            for batch in batches:
                inputs = {key: value.to(model.device) for key, value in batch.items()}
                model.base(**inputs, use_cache=False)
                kwargs = [recorder.call[1] for recorder in recorders]
                mask = batch.get("attention_mask")
                if mask is None:  # the same for all batches of a shape: keep one copy
                    kwargs = same.setdefault(batch["input_ids"].shape, kwargs)
                else:
                    mask = mask.bool().reshape(-1)
                hidden_BLH = self.hidden.keep(recorders[0].call[0])
                found.append(LayerInput(Arguments(kwargs, mask), hidden_BLH))
        model.free(model.base.embed_tokens)
        self.hidden.settle()
        return found

    @torch.no_grad()
    def attend(self, index: int, batches: list[LayerInput]) -> list[FfnInput]:
        """Run a loaded layer up to its FFN: the FFN's inputs and the residuals."""
        layer, found = self.model.layers[index], []
        ffn = self.model.feed_forward(index)
        coming = self.hidden.fetched(batches, lambda batch: [batch.hidden_BLH], use_up=True)
        for batch, (hidden_BLH,) in coming:
            inputs: list[torch.Tensor] = []

            def record(x_BLH: torch.Tensor, inputs: list = inputs) -> Any:
                inputs.append(x_BLH)
                return ffn.returned(torch.zeros_like(x_BLH))

            with replaced_submodule(layer, ffn.family.ffn, ModuleStub(record)):
                residual = unwrap(layer(hidden_BLH, **batch.arguments.kwargs[index]))
            kept = self.hidden.keep(residual), self.hidden.keep(inputs[0])
            found.append(FfnInput(batch.arguments, *kept))
            del batch, hidden_BLH, residual
        self.hidden.settle()
        trim_heap()
        return found

    @torch.no_grad()
    def observe(self, index: int, batches: list[FfnInput], observer: Observer | None) -> None:
        """Show every expert's activations; nothing else is kept, and the batches stay."""
        self._run(index, batches, observer, [None] * len(batches))
        trim_heap()

    @torch.no_grad()
    def keep_phi(
        self,
        index: int,
        batches: list[FfnInput],
        observer: Observer | None,
        *,
        routed: bool = False,
        apart: bool = False,
    ) -> list[FfnPhi]:
        """Show every expert's activations, and keep phi for a layer that is pruned afterwards.

        `routed`: of routed experts alone. `apart`: each expert's in memory of its own.
        """
        records = [PhiRecord(routed=routed, apart=apart) for _ in batches]
        self._run(index, batches, observer, records)
        trim_heap()
        pairs = zip(batches, records, strict=True)
        return [FfnPhi(at, record.calls, routed) for at, record in pairs]

    @torch.no_grad()
    def forward(
        self, index: int, batches: list[FfnInput], observer: Observer | None = None
    ) -> list[LayerInput]:
        """Finish the layer expert by expert, and show each one's activations on the way."""
        if self._on_disk(index):  # all batches' outputs at once
            outputs = [OutputSum(torch.empty_like(at.x_BLH, device="cpu")) for at in batches]
            for output in outputs:
                output.y_TH = self.hidden.keep(output.y_TH)
            self._run(index, batches, observer, outputs)
            ends = [FfnOutput(batches.pop(0), output.y_TH) for output in outputs]
            return self.add(index, ends)
        number = itertools.count()

        def run(batch: FfnInput, x_BLH: torch.Tensor, residual_BLH: torch.Tensor) -> torch.Tensor:
            output = OutputSum(x_BLH)
            self._run_batch(index, next(number), batch, x_BLH, residual_BLH, observer, output)
            return output.y_TH

        return self._finished(index, batches, lambda at: at, run)

    @torch.no_grad()
    def run_layer(self, index: int, batches: list[FfnInput]) -> list[LayerInput]:
        """Finish the layer by the FFN module that it now has."""
        module = self.model.feed_forward(index).module

        def run(batch: FfnInput, x_BLH: torch.Tensor, residual_BLH: torch.Tensor) -> torch.Tensor:
            return unwrap(module(x_BLH)).reshape(-1, x_BLH.shape[-1])

        return self._finished(index, batches, lambda at: at, run)

    @torch.no_grad()
    def project(self, index: int, batches: list[FfnPhi], kept: KeptRows) -> list[LayerInput]:
        """Finish a pruned layer from the phi of the whole one; what wasn't kept is run again."""
        ffn, again = self.model.feed_forward(index), batches[0].routed
        projection = PhiProjection(ffn, rows_on(kept, self.model.device))

        def run(batch: FfnPhi, *tables: torch.Tensor) -> torch.Tensor:
            output = OutputSum(tables[-1])
            for call in batch.calls:
                projection.add(call, output)
            if again:
                projection.add_rest(tables[0], output)
            return output.y_TH

        return self._finished(index, batches, lambda phi: phi.at, run, reads_x=again)

    @torch.no_grad()
    def add(self, index: int, outputs: list[FfnOutput]) -> list[LayerInput]:
        """Add the FFN's outputs to the residuals: the next layer's inputs."""

        def run(output: FfnOutput, residual_BLH: torch.Tensor) -> torch.Tensor:
            return output.y_TH.to(self.model.device)

        return self._finished(index, outputs, lambda output: output.at, run, reads_x=False)

    def _finished(
        self,
        index: int,
        batches: list[Stage],
        place: Callable[[Stage], FfnInput],
        run: Callable[..., torch.Tensor],
        *,
        reads_x: bool = True,
    ) -> list[LayerInput]:
        """The next layer's inputs: what `run` puts out for each batch, added to its residual.

        CameraError for NaN and inf, which are looked for once.
        """
        ffn, found = self.model.feed_forward(index), []
        check = FiniteCheck()

        def tables(stage: Stage) -> list[torch.Tensor]:
            at = place(stage)
            return [at.x_BLH, at.residual_BLH] if reads_x else [at.residual_BLH]

        for stage, (*x, residual_BLH) in self.hidden.fetched(batches, tables, use_up=True):
            at, y_TH = place(stage), run(stage, *x, residual_BLH)
            del stage, x
            hidden_BLH = residual_BLH + ffn.added(y_TH.view_as(residual_BLH))
            check.add(str(len(found)), hidden_BLH)
            found.append(LayerInput(at.arguments, self.hidden.keep(hidden_BLH)))
            release_pages(at.x_BLH)
            del at, y_TH, residual_BLH, hidden_BLH
        if check.first_broken() is not None:
            raise CameraError(
                f"activations after layer {index} hold NaN or inf: check the weights, or run with "
                "dtype=float32."
            )
        self.hidden.settle()
        trim_heap()
        return found

    def _on_disk(self, index: int) -> bool:
        return self.placement.experts_on_disk and self.model.feed_forward(index).routed is not None

    def _run(
        self, index: int, batches: list[FfnInput], observer: Observer | None, sinks: list[Any]
    ) -> None:
        """Run the FFN on every batch, experts on disk after all of them; the batches stay."""
        later = None
        if self._on_disk(index):
            later = DiskExpertsPass(self.model.feed_forward(index).routed)
        hidden = observer is not None and observer.reads_hidden

        def tables(at: FfnInput) -> list[torch.Tensor]:
            return [at.x_BLH, at.residual_BLH] if hidden else [at.x_BLH]

        coming = self.hidden.fetched(batches, tables, use_up=False)
        for i, ((at, (x_BLH, *residual)), sink) in enumerate(zip(coming, sinks, strict=True)):
            self._run_batch(index, i, at, x_BLH, *(residual or [None]), observer, sink, later)
            release_pages(at.x_BLH)
        if later is not None:
            later.run(observer, self.model.device)

    def _run_batch(
        self,
        index: int,
        number: int,
        batch: FfnInput,
        x_BLH: torch.Tensor,
        residual_BLH: torch.Tensor | None,
        observer: Observer | None,
        sink: Any,
        later: DiskExpertsPass | None = None,
    ) -> None:
        """Run the FFN on one batch; `later` evaluates its routed experts."""
        mask_T = batch.arguments.mask_T
        mask_T = None if mask_T is None else mask_T.to(self.model.device)
        if observer is not None:
            hidden_TH = residual_BLH.flatten(0, -2) if observer.reads_hidden else None
            observer.ffn_input(number, x_BLH.flatten(0, -2), hidden_TH, mask_T)
        routed = None if later is None else later.recording(number, mask_T, sink)
        ffn = self.model.feed_forward(index)
        run_ffn(ffn, x_BLH, observer, mask_T=mask_T, sink=sink, batch=number, routed=routed)
