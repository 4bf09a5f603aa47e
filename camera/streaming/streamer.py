"""Text through the layers of a model of which one is in memory.

Shapes: B samples of a batch, L tokens of a sample, H hidden, T = B * L.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from camera.checkpoint.loading import all_finite
from camera.moe.capture import (
    ModuleStub,
    OutputSum,
    PhiRecord,
    project_phi,
    replaced_submodule,
    run_ffn,
    unwrap,
)
from camera.moe.observer import Observer
from camera.moe.pool import KeptRows
from camera.runtime.buffers import trim_heap
from camera.runtime.errors import CameraError
from camera.runtime.mapped import MappedTable, release_pages
from camera.streaming.batches import Arguments, FfnInput, FfnOutput, FfnPhi, LayerInput
from camera.streaming.disk_experts import DiskExpertsPass
from camera.streaming.recorder import ArgumentRecorder
from camera.streaming.skeleton import MetaModel


@dataclass(frozen=True)
class Placement:
    """The places of what doesn't fit in memory: routed experts on disk, hidden states in the folder
    `spill` between layers (None: in RAM)."""

    experts_on_disk: bool = False
    spill: Path | None = None


class LayerStreamer:
    """Runs batches through a model, layer by layer; stages are values (`camera.streaming.batches`).

    Functions of several batches use their list up, so that no batch is there twice.
    """

    def __init__(self, model: MetaModel, placement: Placement | None = None):
        self.model, self.placement = model, placement or Placement()

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
        recorders = nn.ModuleList(ArgumentRecorder(layer) for layer in model.layers)
        found, same = [], {}
        with (
            replaced_submodule(model.base, "layers", recorders),
            replaced_submodule(model.base, "norm", nn.Identity()),
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
                hidden_BLH = self._keep(recorders[0].call[0])
                found.append(LayerInput(Arguments(kwargs, mask), hidden_BLH))
        model.free(model.base.embed_tokens)
        return found

    @torch.no_grad()
    def attend(self, index: int, batches: list[LayerInput]) -> list[FfnInput]:
        """Run a loaded layer up to its FFN: the FFN's inputs and the residuals."""
        layer, found = self.model.layers[index], []
        while batches:
            batch = batches.pop(0)
            inputs: list[torch.Tensor] = []

            def record(x_BLH: torch.Tensor, inputs: list = inputs) -> torch.Tensor:
                inputs.append(x_BLH)
                return torch.zeros_like(x_BLH)

            with replaced_submodule(layer, self.model.family.ffn, ModuleStub(record)):
                hidden_BLH = batch.hidden_BLH.to(self.model.device)
                residual = unwrap(layer(hidden_BLH, **batch.arguments.kwargs[index]))
            found.append(FfnInput(batch.arguments, self._keep(residual), self._keep(inputs[0])))
        trim_heap()
        return found

    @torch.no_grad()
    def observe(self, index: int, batches: list[FfnInput], observer: Observer | None) -> None:
        """Show every expert's activations; nothing else is kept, and the batches stay."""
        self._run(index, batches, observer, [None] * len(batches))
        trim_heap()

    @torch.no_grad()
    def keep_phi(
        self, index: int, batches: list[FfnInput], observer: Observer | None
    ) -> list[FfnPhi]:
        """Show every expert's activations, and keep phi for a layer that is pruned afterwards."""
        records = [PhiRecord() for _ in batches]
        self._run(index, batches, observer, records)
        trim_heap()
        return [FfnPhi(at, record.calls) for at, record in zip(batches, records, strict=True)]

    @torch.no_grad()
    def forward(
        self, index: int, batches: list[FfnInput], observer: Observer | None = None
    ) -> list[LayerInput]:
        """Finish the layer expert by expert, and show each one's activations on the way."""
        found: list[LayerInput] = []
        if self._on_disk(index):  # all batches' outputs at once
            outputs = [OutputSum(batch.x_BLH) for batch in batches]
            for output in outputs:
                output.y_TH = self._keep(output.y_TH)
            self._run(index, batches, observer, outputs)
            for output in outputs:
                found.append(self.add(index, FfnOutput(batches.pop(0), output.y_TH)))
        number = 0
        while batches:
            batch = batches.pop(0)
            output = OutputSum(batch.x_BLH.to(self.model.device))
            self._run(index, [batch], observer, [output], first=number)
            found.append(self.add(index, FfnOutput(batch, output.y_TH)))
            number += 1
        trim_heap()
        return found

    @torch.no_grad()
    def run_layer(self, index: int, batches: list[FfnInput]) -> list[LayerInput]:
        """Finish the layer by the FFN module that it now has."""
        module, found = self.model.feed_forward(index).module, []
        while batches:
            batch = batches.pop(0)
            y_BLH = module(batch.x_BLH.to(self.model.device))
            found.append(self.add(index, FfnOutput(batch, y_BLH.flatten(0, -2))))
        trim_heap()
        return found

    @torch.no_grad()
    def project(self, index: int, batches: list[FfnPhi], kept: KeptRows) -> list[LayerInput]:
        """Finish a pruned layer from the phi of the whole one."""
        ffn, found = self.model.feed_forward(index), []
        while batches:
            batch = batches.pop(0)
            output = OutputSum(batch.at.x_BLH.to(self.model.device))
            y_TH = project_phi(ffn, batch.calls, kept, output)
            found.append(self.add(index, FfnOutput(batch.at, y_TH)))
        trim_heap()
        return found

    @torch.no_grad()
    def add(self, index: int, output: FfnOutput) -> LayerInput:
        """Add the FFN's output to the residual: the next layer's input.

        CameraError for NaN and inf.
        """
        device, scale = self.model.device, self.model.feed_forward(index).residual_scale
        y_BLH = output.y_TH.to(device).view_as(output.at.x_BLH)
        hidden_BLH = output.at.residual_BLH.to(device) + y_BLH * scale
        if not all_finite(hidden_BLH):
            raise CameraError(
                f"activations after layer {index} hold NaN or inf: check the weights, or run with "
                "dtype=float32."
            )
        return LayerInput(output.at.arguments, self._keep(hidden_BLH))

    def _on_disk(self, index: int) -> bool:
        return self.placement.experts_on_disk and self.model.feed_forward(index).routed is not None

    def _run(
        self,
        index: int,
        batches: list[FfnInput],
        observer: Observer | None,
        sinks: list[Any],
        first: int = 0,
    ) -> None:
        """Run the FFN on every batch, experts on disk after all of them; `first` is the number of
        the first batch."""
        ffn, device = self.model.feed_forward(index), self.model.device
        later = DiskExpertsPass(ffn.routed) if self._on_disk(index) else None
        for i, (batch, sink) in enumerate(zip(batches, sinks, strict=True), first):
            mask_T = batch.arguments.mask_T
            mask_T = None if mask_T is None else mask_T.to(device)
            x_BLH = batch.x_BLH.to(device)
            if observer is not None:
                hidden_TH = None
                if observer.reads_hidden:
                    hidden_TH = batch.residual_BLH.to(device).flatten(0, -2)
                observer.ffn_input(i, x_BLH.flatten(0, -2), hidden_TH, mask_T)
            routed = None if later is None else later.recording(i, mask_T, sink)
            run_ffn(ffn, x_BLH, observer, mask_T=mask_T, sink=sink, batch=i, routed=routed)
            release_pages(batch.x_BLH)
        if later is not None:
            later.run(observer, device)

    def _keep(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states on their way to the next layer: in RAM or mapped from disk."""
        if self.placement.spill is None:
            return states.cpu()
        tokens, hidden = states[..., 0].numel(), states.shape[-1]
        table = MappedTable(tokens, hidden, states.dtype, -1, self.placement.spill)
        table.write(0, states)
        return table.read(0, tokens).view_as(states)
