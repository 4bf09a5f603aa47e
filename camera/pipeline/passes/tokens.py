"""Calibration tokens of the compressed pass, and the refits that they serve.

Where the target is the dense model's hidden states, or half way to them, its tokens go through
every layer before it is compressed, beside those of the compressed model.

Shapes: T tokens of all batches, H hidden, A width of all attention heads together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from camera.compensation.attention import refit_attention
from camera.compensation.experts import Weights, compensate
from camera.compensation.settings import CompensationSettings
from camera.moe.pool import KeptRows
from camera.pipeline.context import PassContext
from camera.pipeline.passes.dense import embedded, resumed
from camera.pipeline.resume import PassProgress
from camera.streaming.batches import FfnInput, FfnOutput, FfnPhi, LayerInput


class CompressedTokens:
    """Batches before the next layer: the compressed model's and, where they are the target, the
    dense model's."""

    def __init__(self, context: PassContext, progress: PassProgress):
        self._streamer, self._settings = context.streamer, context.method.compensation
        self.batches = embedded(context)
        self.dense: list[LayerInput] | None = None
        if self._settings is not None and self._settings.dense_share:
            self.dense = list(self.batches)
        if progress.done:
            everything = resumed([*self.batches, *(self.dense or [])], progress)
            count = len(self.batches)
            self.batches = everything[:count]
            self.dense = None if self.dense is None else everything[count:]

    def hidden(self) -> list[torch.Tensor]:
        """Hidden states before the next layer, for resuming."""
        return [batch.hidden_BLH for batch in [*self.batches, *(self.dense or [])]]

    @torch.no_grad()
    def attend(self, index: int) -> tuple[list[FfnInput], dict[str, Any]]:
        """Run a loaded layer up to its FFN, attention refitted where the dense model is the target;
        what that did."""
        if self.dense is None:
            return self._streamer.attend(index, self.batches), {}
        dense = self._streamer.attend(index, self.dense)
        if self._settings.target == "between":
            self.dense = self._streamer.forward(index, dense)
            return self._streamer.attend(index, self.batches), {}
        entered = list(self.batches)
        output = self._attention_output(index)
        if output is None:
            inputs = self._streamer.attend(index, self.batches)
            name = self._streamer.model.family.attention_output
            report = {"left": f"this layer has no '{name}'" if name else "not in this family"}
        else:
            inputs, report = self._refit_attention(index, output, dense, self._settings)
            if any(report["ridges"]):
                inputs = self._streamer.attend(index, entered)
        self.dense = self._streamer.forward(index, dense)
        return inputs, {"attention": report}

    def _attention_output(self, index: int) -> nn.Linear | None:
        """The layer's projection that is refitted; None in a layer of another kind than attention,
        and in families where none is declared."""
        model = self._streamer.model
        name = model.family.attention_output
        return dict(model.layers[index].named_modules()).get(name) if name else None

    def _refit_attention(
        self,
        index: int,
        output: nn.Linear,
        dense: list[FfnInput],
        settings: CompensationSettings,
    ) -> tuple[list[FfnInput], dict[str, Any]]:
        """Run a layer up to its FFN as it is, then refit its attention."""
        model, heads = self._streamer.model, []
        hook = output.register_forward_pre_hook(
            lambda _, inputs: heads.append(inputs[0].flatten(0, 1))
        )
        with hook:
            inputs = self._streamer.attend(index, self.batches)
        target_TH, scale = _residuals(model.device, dense), model.feed_forward(index).residual_scale
        missing_TH = _residuals(model.device, inputs).float().sub_(target_TH).div_(-scale)
        fitted = _fitted(settings, inputs)
        heads_TA = torch.cat(heads)
        return inputs, refit_attention(output, heads_TA, missing_TH, target_TH, fitted, settings)

    @torch.no_grad()
    def compensate(
        self, index: int, phi: list[FfnPhi], kept: KeptRows, before: Weights
    ) -> tuple[list[FfnOutput], dict[str, Any]]:
        """Refit a pruned layer, whose output weights were `before`; its outputs, and a report."""
        model, settings = self._streamer.model, self._settings
        ffn, inputs = model.feed_forward(index), [batch.at for batch in phi]
        stream_TH, target_TH = _residuals(model.device, inputs).float(), None
        if self.dense is not None:
            target_TH = _joined(model.device, [batch.hidden_BLH for batch in self.dense]).float()
            target_TH = target_TH.sub_(stream_TH).div_(ffn.residual_scale)
        stream_TH = stream_TH if settings.token_weights == "relative" else None
        y_TH, report = compensate(
            ffn,
            [(batch.at.tokens, batch.calls) for batch in phi],
            kept,
            before,
            _fitted(settings, inputs),
            settings,
            target_TH,
            stream_TH,
        )
        parts = y_TH.split([batch.tokens for batch in inputs])
        return [FfnOutput(at, part) for at, part in zip(inputs, parts, strict=True)], report


def _residuals(device: torch.device, inputs: list[FfnInput]) -> torch.Tensor:
    return _joined(device, [batch.residual_BLH for batch in inputs])


def _joined(device: torch.device, states: list[torch.Tensor]) -> torch.Tensor:
    """A copy of all batches' hidden states, [T, H], put together where they go to."""
    counts = [hidden_BLH[..., 0].numel() for hidden_BLH in states]
    joined_TH = states[0].new_empty(sum(counts), states[0].shape[-1], device=device)
    for part_TH, hidden_BLH in zip(joined_TH.split(counts), states, strict=True):
        part_TH.copy_(hidden_BLH.flatten(0, 1))
    return joined_TH


def _fitted(settings: CompensationSettings, inputs: list[FfnInput]) -> int:
    shapes = [batch.x_BLH.shape for batch in inputs]
    return settings.fitted(sum(shape[0] for shape in shapes), shapes[0][1])
