"""One decoder layer backwards: the gradient of its input, and what each of its experts did.

The layer runs again from its stored input, its experts replaced by taps whose activations are part
of the graph; nothing of the routing is computed here, so routing weights carry gradients as in the
model. Weights stay frozen: only activation gradients exist.

Shapes: B samples, L tokens of a sample, T = B * L tokens, H hidden, K experts per token,
S = T * K slots, N tokens of one expert, W width of one expert.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from camera.calibration.statistics import LayerStatistics
from camera.moe.capture import Tap, swapped, unwrap
from camera.moe.feed_forward import ExpertGroup, FeedForward, MlpExpert
from camera.moe.routing import routed_slots


@dataclass
class ExpertGradients:
    """What one expert did in one batch, and the gradients of the loss there; no padding.

    `tokens_N` are positions in the batch, ascending; x_NH in the model's precision, h_NW
    (activations before the routing weight), a_N (routing weight, None for 1) and dh_NW = dloss/dh
    (which contains a already) in fp32.
    """

    group: ExpertGroup
    expert: int
    tokens_N: torch.Tensor
    x_NH: torch.Tensor
    h_NW: torch.Tensor
    a_N: torch.Tensor | None
    dh_NW: torch.Tensor
    _doutput_TH: torch.Tensor  # dloss / d what the group's module returned
    _length: int  # tokens of a sample

    @property
    def sample_N(self) -> torch.Tensor:
        """Which sample of the batch each token belongs to; ascending."""
        return self.tokens_N // self._length

    @property
    def dy_NH(self) -> torch.Tensor:
        """dloss/dy of the expert's output y = w_down h, before the routing weight: contains a."""
        dy_NH = self._doutput_TH[self.tokens_N].float()
        return dy_NH * self.a_N[:, None] if self.group.routed else dy_NH

    @cached_property
    def _dgate_dup(self) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            if isinstance(self.group, MlpExpert):
                mlp = self.group.module
                gate_NW, up_NW = mlp.gate_proj(self.x_NH), mlp.up_proj(self.x_NH)
            else:
                gate_NW, up_NW = (F.linear(self.x_NH, w) for w in self.group.gate_up(self.expert))
        with torch.enable_grad():
            gate_NW = gate_NW.float().requires_grad_()
            act_NW = self.group.act_fn(gate_NW)
            (dgate_NW,) = torch.autograd.grad(act_NW, gate_NW, self.dh_NW * up_NW.float())
        return dgate_NW, self.dh_NW * act_NW.detach()

    def preactivations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dloss/d(gate x) and dloss/d(up x), both [N, W] in fp32, with h = act(gate x) * (up x)."""
        return self._dgate_dup

    def weights(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For every sample that reached the expert: the gradients of gate_WH, up_WH, down_HW.

        dgate = sum over the sample's tokens of dloss/d(gate x) x^T, and so on; fp32.
        """
        dgate_NW, dup_NW = self.preactivations()
        counts = torch.bincount(self.sample_N)
        parts = counts[counts > 0].tolist()
        tensors = (self.x_NH.float(), self.h_NW, self.dy_NH, dgate_NW, dup_NW)
        for x, h, dy, dgate, dup in zip(*(t.split(parts) for t in tensors), strict=True):
            yield dgate.T @ x, dup.T @ x, dy.T @ h


class GradientObserver(Protocol):
    """What a backward method looks at a layer with: called once per batch and expert reached."""

    def __call__(self, seen: ExpertGradients) -> None: ...

    def result(self) -> LayerStatistics: ...


def backpropagate(
    layer: nn.Module,
    ffn: FeedForward,
    hidden_BLH: torch.Tensor,
    kwargs: dict[str, Any],
    dout_BLH: torch.Tensor,
    observer: GradientObserver | None = None,
    mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """dloss/d(input of the layer) from dloss/d(its output), showing `observer` every expert.

    Tokens where `mask_T` is False (padding) carry gradients as in the model, and stay unseen.
    """
    taps = [_MlpTap(g) if isinstance(g, MlpExpert) else _RoutedTap(g) for g in ffn.groups]
    with torch.enable_grad(), ExitStack() as swaps:
        input_BLH = hidden_BLH.detach().requires_grad_()
        for tap in taps if observer is not None else []:
            swaps.enter_context(swapped(*_place(layer, ffn, tap.group), Tap(tap)))
        out_BLH = unwrap(layer(input_BLH, **kwargs))
    calls = [call for tap in taps for call in tap.calls]
    outputs = [tap.output for tap in taps if tap.calls]
    wanted = [input_BLH, *outputs, *(call.h_NW for call in calls)]
    dinput_BLH, *rest = torch.autograd.grad(out_BLH, wanted, dout_BLH)
    del out_BLH
    doutputs, dhs = rest[: len(outputs)], iter(rest[len(outputs) :])
    for tap, doutput in zip((tap for tap in taps if tap.calls), doutputs, strict=True):
        for call in tap.calls:
            seen = call.with_gradients(next(dhs), doutput.flatten(0, -2), hidden_BLH.shape[1])
            if mask_T is not None:
                seen = _unpadded(seen, mask_T)
            if len(seen.tokens_N):
                observer(seen)
    return dinput_BLH


def _place(layer: nn.Module, ffn: FeedForward, group: ExpertGroup) -> tuple[nn.Module, str]:
    if not ffn.is_moe:
        return layer, ffn.family.ffn
    return ffn.module, ffn.family.experts if group.routed else ffn.family.shared


def _unpadded(seen: ExpertGradients, mask_T: torch.Tensor) -> ExpertGradients:
    shown_N = mask_T[seen.tokens_N]
    for name in ("tokens_N", "x_NH", "h_NW", "a_N", "dh_NW"):
        value = getattr(seen, name)
        setattr(seen, name, None if value is None else value[shown_N])
    return seen


@dataclass
class _Call:
    """One expert's part of the graph."""

    group: ExpertGroup
    expert: int
    tokens_N: torch.Tensor
    x_NH: torch.Tensor
    h_NW: torch.Tensor
    a_N: torch.Tensor | None

    def with_gradients(
        self, dh_NW: torch.Tensor, doutput_TH: torch.Tensor, length: int
    ) -> ExpertGradients:
        a_N = None if self.a_N is None else self.a_N.detach()
        x_NH, h_NW = self.x_NH.detach(), self.h_NW.detach()
        return ExpertGradients(
            self.group, self.expert, self.tokens_N, x_NH, h_NW, a_N, dh_NW, doutput_TH, length
        )


class _RoutedTap:
    """Computes routed experts with their activations in the graph."""

    def __init__(self, group: ExpertGroup):
        self.group = group
        self.calls: list[_Call] = []
        self.output: torch.Tensor

    def __call__(
        self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        group, top_k = self.group, index_TK.shape[-1]
        experts, slots = zip(*routed_slots(index_TK, len(group.widths)), strict=True)
        sizes, order_S = [len(part) for part in slots], torch.cat(slots)
        token_S, weight_S = order_S // top_k, weight_TK.reshape(-1)[order_S].float()
        parts = zip(
            experts,
            token_S.split(sizes),
            x_TH[token_S].split(sizes),  # gathered once: one scatter on the way back
            weight_S.split(sizes),
            strict=True,
        )
        outputs = []
        for expert, tokens_N, x_NH, a_N in parts:
            h_NW = group.activations(expert, x_NH)
            outputs.append(group.project(expert, (h_NW * a_N[:, None]).to(x_TH.dtype)))
            self.calls.append(_Call(group, expert, tokens_N, x_NH, h_NW, a_N))
        self.output = torch.zeros_like(x_TH).index_add(0, token_S, torch.cat(outputs))
        return self.output


class _MlpTap:
    """Computes a shared expert, or a dense FFN, with its activations in the graph."""

    def __init__(self, group: MlpExpert):
        self.group = group
        self.calls: list[_Call] = []
        self.output: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        group, x_TH = self.group, x.reshape(-1, x.shape[-1])
        h_TW, tokens_T = group.activations(0, x_TH), torch.arange(len(x_TH), device=x.device)
        with torch.no_grad():
            a_T = group.scale(x_TH)
        self.calls.append(_Call(group, 0, tokens_T, x_TH, h_TW, a_T))
        self.output = group.project(0, h_TW.to(x.dtype)).view_as(x)
        return self.output
