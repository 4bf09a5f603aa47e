"""One decoder layer in memory at a time: load, look, compress, propagate, free.

Shapes: B samples of a batch, L tokens of a sample, H hidden, T = B * L.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from camera.compensation.attention import refit_attention
from camera.compensation.experts import Weights, compensate
from camera.compensation.settings import Refit
from camera.moe.capture import Observer, Output, Tap, Trace, observe, swapped, unobserved, unwrap
from camera.moe.pool import Kept
from camera.pipeline.estimate import Needs, needs
from camera.runtime.buffers import give_back
from camera.runtime.errors import CameraError
from camera.runtime.mapped import HiddenStates, let_go
from camera.streaming.batches import Batch
from camera.streaming.disk_experts import Visit
from camera.streaming.recorder import Recorder
from camera.streaming.settings import Memory
from camera.streaming.skeleton import Skeleton, all_finite


class Streamer(Skeleton):
    """Runs text through a model of which never more than one decoder layer is in memory.

    With a folder `spill`, hidden states wait on disk between the layers.
    """

    spill: Path | None = None

    def prepare(
        self, memory: Memory, tokens: int, slices: bool, folder: Path, **method: int
    ) -> Needs:
        """Decide what stays in memory for a run over so many tokens, and say what that takes.

        `method` is what `camera.pipeline.estimate.needs` asks of it beside `slices`.
        """
        found = needs(self, memory, tokens, slices, **method)
        self.visit = found.visit
        self.spill = folder if found.hidden_on_disk else None
        return found

    @torch.no_grad()
    def embed(self, batches: Iterable[dict[str, torch.Tensor]]) -> list[Batch]:
        """Run everything before the first layer; what the model would pass to each layer is kept.

        Embeddings, masks and rotary positions come from the model's own forward, run with layers
        that only record their arguments.
        """
        self.load_rest("embed_tokens")
        recorders = nn.ModuleList(Recorder(layer) for layer in self.layers)
        found, seen = [], {}
        with swapped(self.base, "layers", recorders), swapped(self.base, "norm", nn.Identity()):
            for batch in batches:
                inputs = {key: value.to(self.device) for key, value in batch.items()}
                self.base(**inputs, use_cache=False)
                kwargs = [recorder.call[1] for recorder in recorders]
                mask = batch.get("attention_mask")
                if mask is None:  # the same for all batches of a shape: keep one copy
                    kwargs = seen.setdefault(batch["input_ids"].shape, kwargs)
                else:
                    mask = mask.bool().reshape(-1)
                found.append(Batch(self._keep(recorders[0].call[0]), kwargs, mask))
        self.free(self.base.embed_tokens)
        return found

    @torch.no_grad()
    def attend(self, index: int, batches: list[Batch]) -> None:
        """Run a loaded layer up to its FFN, once: keeps the FFN's input and the residual."""
        layer = self.layers[index]
        for batch in batches:
            seen: list[torch.Tensor] = []

            def record(x_BLH: torch.Tensor, seen: list = seen) -> torch.Tensor:
                seen.append(x_BLH)
                return torch.zeros_like(x_BLH)

            with swapped(layer, self.family.ffn, Tap(record)):
                residual = unwrap(layer(batch.hidden_BLH.to(self.device), **batch.kwargs[index]))
            batch.hidden_BLH = self._keep(residual)
            batch.ffn_input_BLH = self._keep(seen[0])
        give_back()

    @torch.no_grad()
    def observe(
        self,
        index: int,
        batches: list[Batch],
        observer: Observer = unobserved,
        *,
        propagate: bool = False,
        trace: bool = False,
    ) -> None:
        """Show the observer what each expert sees; and before, of each batch, the FFN's input if it
        has `begin(x_TH, mask_T)`. If it has `counts(h_TH)`, this says from the hidden states that
        the FFN's output is added to how much each token's phi counts, [T].

        With `propagate` the layer is finished as it is; with `trace` phi is kept, and `propagate`
        called later, on the cut layer, needs no more than its `down_proj`.
        """
        ffn = self.feed_forward(index)
        routed = next((group for group in ffn.groups if group.routed), None)
        visit = Visit(routed) if self.visit and routed is not None else None
        for batch in batches:
            mask_T = None if batch.mask_T is None else batch.mask_T.to(self.device)
            x_BLH = batch.ffn_input_BLH.to(self.device)
            counts_T = None
            if hasattr(observer, "counts"):
                counts_T = observer.counts(batch.hidden_BLH.to(self.device).flatten(0, -2))
            if hasattr(observer, "begin"):
                observer.begin(x_BLH.flatten(0, -2), mask_T)
            sink = None
            if propagate:
                sink = batch.output = Output(x_BLH if visit is None else batch.ffn_input_BLH)
                if visit is not None:  # all batches' at once
                    sink.y_TH = self._keep(sink.y_TH)
            elif trace:
                sink = batch.trace = Trace(x_BLH[..., 0].numel())
            observe(ffn, x_BLH, observer, mask_T, sink, visit and visit.record, counts_T)
            let_go(batch.ffn_input_BLH)
            if propagate and visit is None:
                self._finish(index, batch, ffn.residual_scale)
        if visit is not None:
            visit.look(observer, self.device)
            for batch in batches if propagate else ():
                self._finish(index, batch, ffn.residual_scale)
        give_back()

    @torch.no_grad()
    def propagate(self, index: int, batches: list[Batch], kept: Kept | None = None) -> None:
        """Finish the layer with the FFN it now has: the next layer's inputs.

        Where phi was kept, `kept` says which of its columns the layer still has; else the FFN runs.
        """
        ffn = self.feed_forward(index)
        for batch in batches:
            if batch.output is not None:
                self._finish(index, batch, ffn.residual_scale)
                continue
            x_BLH = batch.ffn_input_BLH.to(self.device)
            if batch.trace is None:
                y_BLH = ffn.module(x_BLH)
            else:
                y_BLH = batch.trace.finish(ffn, kept, Output(x_BLH)).view_as(x_BLH)
            self._add(index, batch, y_BLH, ffn.residual_scale)
        give_back()

    @torch.no_grad()
    def compensate(
        self,
        index: int,
        batches: list[Batch],
        kept: Kept,
        before: Weights,
        how: Refit,
        dense: list[Batch] | None = None,
    ) -> dict[str, Any]:
        """Refit the cut layer's output weights to the output of the layer `before`; a report.

        Phi must have been kept (`trace`). The layer's new output is kept for `propagate`. With
        `dense`, the dense model's batches after the layer, these are what is aimed at.
        """
        ffn = self.feed_forward(index)
        traces = [batch.trace for batch in batches]
        shapes = [batch.ffn_input_BLH.shape for batch in batches]
        fitted = how.fitted(sum(shape[0] for shape in shapes), shapes[0][1])
        target_TH, stream_TH = None, self._hidden(batches).float()
        if dense is not None:
            target_TH = self._hidden(dense).float().sub_(stream_TH).div_(ffn.residual_scale)
        stream_TH = stream_TH if how.token_weights == "relative" else None
        y_TH, report = compensate(ffn, traces, kept, before, fitted, how, target_TH, stream_TH)
        parts = y_TH.split([trace.tokens for trace in traces])
        for batch, part_TH in zip(batches, parts, strict=True):
            batch.trace, batch.output = None, Output(batch.ffn_input_BLH[:0])
            batch.output.y_TH = part_TH
        return report

    @torch.no_grad()
    def attend_refitted(
        self, index: int, batches: list[Batch], dense: list[Batch], how: Refit
    ) -> dict[str, Any]:
        """Run a loaded layer up to its FFN, its attention's output weights refitted; a report.

        `dense` are the dense model's batches after its attention, which are aimed at.
        """
        entered = [batch.hidden_BLH for batch in batches]
        report = self._refit_attention(index, batches, dense, how)
        if any(report["ridges"]):
            for batch, hidden_BLH in zip(batches, entered, strict=True):
                batch.hidden_BLH = hidden_BLH
            self.attend(index, batches)
        return report

    def _refit_attention(
        self, index: int, batches: list[Batch], dense: list[Batch], how: Refit
    ) -> dict[str, Any]:
        """Run a layer up to its FFN as it is, then refit its attention; a report."""
        output, heads = self.layers[index].get_submodule(self.family.attention_output), []
        hook = output.register_forward_pre_hook(
            lambda _, inputs: heads.append(inputs[0].flatten(0, 1))
        )
        with hook:
            self.attend(index, batches)
        aim_TH = self._hidden(dense)
        scale = self.feed_forward(index).residual_scale
        missing_TH = self._hidden(batches).float().sub_(aim_TH).div_(-scale)
        shapes = [batch.hidden_BLH.shape for batch in batches]
        fitted = how.fitted(sum(shape[0] for shape in shapes), shapes[0][1])
        return refit_attention(output, torch.cat(heads), missing_TH, aim_TH, fitted, how)

    def _hidden(self, batches: list[Batch]) -> torch.Tensor:
        """A copy of the hidden states of all batches, [T, H]."""
        return torch.cat([batch.hidden_BLH.flatten(0, 1) for batch in batches]).to(self.device)

    def _finish(self, index: int, batch: Batch, scale: float) -> None:
        y_TH, batch.output = batch.output.y_TH.to(self.device), None
        self._add(index, batch, y_TH.view_as(batch.ffn_input_BLH), scale)

    def _add(self, index: int, batch: Batch, y_BLH: torch.Tensor, scale: float) -> None:
        out_BLH = batch.hidden_BLH.to(self.device) + y_BLH * scale
        if not all_finite(out_BLH):
            raise CameraError(
                f"activations after layer {index} hold NaN or inf: check the weights, or run with "
                "dtype=float32."
            )
        batch.ffn_input_BLH = batch.trace = None
        batch.hidden_BLH = self._keep(out_BLH)

    def _keep(self, states_BLH: torch.Tensor) -> torch.Tensor:
        """Hidden states on their way to the next layer: in the CPU's memory or mapped from disk."""
        if self.spill is None:
            return states_BLH.cpu()
        tokens, hidden = states_BLH[..., 0].numel(), states_BLH.shape[-1]
        table = HiddenStates(tokens, hidden, states_BLH.dtype, -1, self.spill)
        table.write(0, states_BLH)
        return table.read(0, tokens).view_as(states_BLH)
