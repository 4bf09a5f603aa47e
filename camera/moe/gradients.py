"""One decoder layer backwards: the gradient of its input, and the gradients of each expert.

The layer runs again from its stored input, its experts replaced by stubs whose activations are part
of the graph; nothing of the routing is computed here, so routing weights carry gradients as in the
model. Weights stay frozen: only activation gradients exist.

Shapes: B samples, L tokens of a sample, T = B * L tokens, H hidden, K experts per token,
S = T * K slots, N tokens of one expert, W width of one expert.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from camera.moe.capture import ModuleStub, replaced_submodule, unwrap
from camera.moe.experts.activation import gated
from camera.moe.experts.group import ExpertGroup, MlpExpert
from camera.moe.feed_forward import FeedForward
from camera.moe.grouped.slots import routed_slots
from camera.moe.observer import ExpertCall


@dataclass(frozen=True)
class GradientCall(ExpertCall):
    """One expert on the tokens of one batch, and the gradients of the loss there; no padding.

    `tokens_N` are ascending; dh_NW = dloss/dh, fp32, contains the routing weight already.
    """

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
            products = self.group.preactivations(self.expert, self.x_NH)
        with torch.enable_grad():
            gate_NW, up_NW = (part.detach().requires_grad_() for part in products)
            h_NW = gated(self.group.act_fn, gate_NW, up_NW)
            return torch.autograd.grad(h_NW, (gate_NW, up_NW), self.dh_NW)

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


GradientObserver = Callable[[GradientCall], None]
"""Called once for every batch and expert that tokens reach."""


def backpropagate(
    layer: nn.Module,
    ffn: FeedForward,
    hidden_BLH: torch.Tensor,
    kwargs: dict[str, Any],
    dout_BLH: torch.Tensor,
    observer: GradientObserver | None = None,
    mask_T: torch.Tensor | None = None,
    batch: int = 0,
) -> torch.Tensor:
    """dloss/d(input of the layer) from dloss/d(its output), showing `observer` every expert.

    Tokens where `mask_T` is False (padding) carry gradients as in the model, and stay unseen.
    """
    stubs = [_MlpStub(g) if isinstance(g, MlpExpert) else _RoutedStub(g) for g in ffn.groups]
    with torch.enable_grad(), ExitStack() as swaps:
        input_BLH = hidden_BLH.detach().requires_grad_()
        for stub in stubs if observer is not None else []:
            swaps.enter_context(
                replaced_submodule(*_place(layer, ffn, stub.group), ModuleStub(stub))
            )
        out_BLH = unwrap(layer(input_BLH, **kwargs))
    calls = [call for stub in stubs for call in stub.calls]
    outputs = [stub.output for stub in stubs if stub.calls]
    wanted = [input_BLH, *outputs, *(call.h_NW for call in calls)]
    dinput_BLH, *rest = torch.autograd.grad(out_BLH, wanted, dout_BLH)
    del out_BLH
    doutputs, dhs = rest[: len(outputs)], iter(rest[len(outputs) :])
    for stub, doutput in zip((stub for stub in stubs if stub.calls), doutputs, strict=True):
        for part in stub.calls:
            doutput_TH = doutput.flatten(0, -2)
            call = part.with_gradients(batch, next(dhs), doutput_TH, hidden_BLH.shape[1])
            if mask_T is not None:
                call = _unpadded(call, mask_T)
            if len(call.tokens_N):
                observer(call)
    return dinput_BLH


def _place(layer: nn.Module, ffn: FeedForward, group: ExpertGroup) -> tuple[nn.Module, str]:
    if not ffn.is_moe:
        return layer, ffn.family.ffn
    return ffn.module, ffn.family.experts if group.routed else ffn.family.shared


def _unpadded(call: GradientCall, mask_T: torch.Tensor) -> GradientCall:
    shown_N = mask_T[call.tokens_N]
    names = ("tokens_N", "x_NH", "h_NW", "a_N", "dh_NW")
    parts = {name: getattr(call, name) for name in names}
    return replace(call, **{k: None if v is None else v[shown_N] for k, v in parts.items()})


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
        self, batch: int, dh_NW: torch.Tensor, doutput_TH: torch.Tensor, length: int
    ) -> GradientCall:
        a_N = None if self.a_N is None else self.a_N.detach()
        x_NH, h_NW = self.x_NH.detach(), self.h_NW.detach()
        place = (self.group, self.expert, batch, self.tokens_N)
        return GradientCall(*place, x_NH, h_NW, a_N, dh_NW, doutput_TH, length)


class _RoutedStub:
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
        row_S = order_S.argsort()  # where each slot went
        token_S, row_TK = order_S // top_k, row_S.view_as(index_TK)
        x_SH = _Gathered.apply(x_TH, token_S, row_TK)
        weight_S1 = _Gathered.apply(weight_TK.reshape(-1, 1), order_S, row_S[:, None])
        parts = zip(
            experts,
            token_S.split(sizes),
            x_SH.split(sizes),
            (weight_S1[:, 0].float() * group.scale).split(sizes),
            strict=True,
        )
        outputs = []
        for expert, tokens_N, x_NH, a_N in parts:
            h_NW = group.activations(expert, x_NH)
            phi_NW = (h_NW * a_N[:, None]).to(x_TH.dtype)
            outputs.append(group.project(expert, phi_NW, a_N))
            self.calls.append(_Call(group, expert, tokens_N, x_NH, h_NW, a_N))
        self.output = _Summed.apply(torch.cat(outputs), token_S, row_TK)
        # what the block multiplies the sum by is in the weights already
        return self.output if group.scale == 1 else self.output / group.scale


class _Gathered(torch.autograd.Function):
    """The rows of x_TH that each slot reads; on the way back a token's K rows are summed.

    row_TK says where the slots of a token are, so that nothing is added in an order of the moment:
    index_add's atomics would give other last bits in every run.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, token_S: torch.Tensor, row_TK: torch.Tensor):
        ctx.save_for_backward(row_TK)
        return x_TH.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, dx_SH: torch.Tensor):
        (row_TK,) = ctx.saved_tensors
        return _sum_of_slots(dx_SH, row_TK), None, None


class _Summed(torch.autograd.Function):
    """The sum of each token's K rows; on the way back each row has its token's gradient."""

    @staticmethod
    def forward(ctx: Any, y_SH: torch.Tensor, token_S: torch.Tensor, row_TK: torch.Tensor):
        ctx.save_for_backward(token_S)
        return _sum_of_slots(y_SH, row_TK)

    @staticmethod
    def backward(ctx: Any, dy_TH: torch.Tensor):
        (token_S,) = ctx.saved_tensors
        return dy_TH.index_select(0, token_S), None, None


def _sum_of_slots(y_SH: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    tokens, top_k = row_TK.shape
    return y_SH.index_select(0, row_TK.reshape(-1)).view(tokens, top_k, -1).sum(1)


class _MlpStub:
    """Computes a shared expert, or a dense FFN, with its activations in the graph."""

    def __init__(self, group: MlpExpert):
        self.group = group
        self.calls: list[_Call] = []
        self.output: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        group, x_TH = self.group, x.reshape(-1, x.shape[-1])
        h_TW, tokens_T = group.activations(0, x_TH), torch.arange(len(x_TH), device=x.device)
        with torch.no_grad():
            a_T = group.weight(x_TH)
        self.calls.append(_Call(group, 0, tokens_T, x_TH, h_TW, a_T))
        self.output = group.project(0, h_TW.to(x.dtype)).view_as(x)
        return self.output
