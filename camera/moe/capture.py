"""One forward pass of a layer's FFN, with each expert's activations passed to an observer.

The layer's own router decides; its experts are replaced, for the length of the call, by stubs that
compute only the tokens routed to them. Nothing of the routing is computed here.

Shapes: B samples, L tokens of a sample, T = B * L tokens, H hidden, K experts per token,
S = T * K slots, N tokens of one expert, W width of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from camera.moe.experts.group import ExpertGroup, MlpExpert, RoutedExperts
from camera.moe.feed_forward import FeedForward
from camera.moe.grouped.call import GroupCall
from camera.moe.grouped.rows import mlp_rows, routed_rows
from camera.moe.grouped.sinks import Sink
from camera.moe.grouped.slots import counts_of, sorted_slots
from camera.moe.observer import ExpertCall, Observer

RoutedCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""call(x_TH, index_TK, weight_TK) -> y_TH: what native routed experts are called with."""


def run_ffn(
    ffn: FeedForward,
    x_BLH: torch.Tensor,
    observer: Observer | Callable[[ExpertCall], None] | None = None,
    *,
    mask_T: torch.Tensor | None = None,
    sink: Sink | None = None,
    batch: int = 0,
    routed: RoutedCall | None = None,
    together: bool | None = None,
) -> None:
    """Call `observer`, and `sink` if given, for every expert that x reaches.

    Where routed experts are evaluated later, `routed` stands for them. Tokens where `mask_T` is
    False (padding) are routed as the model would, and reach the sink; the observer never sees them.
    The experts of a group are computed `together`, by default on an accelerator, where there is no
    padding.
    """
    if together is None:
        together = computes_together(x_BLH.device)
    together = together and mask_T is None
    if not ffn.is_moe:
        _stand_in(ffn.groups[0], observer, mask_T, sink, batch, together)(x_BLH)
        return
    with ExitStack() as stubs:
        for group in ffn.groups:
            name = ffn.family.experts if group.routed else ffn.family.shared
            function = _stand_in(group, observer, mask_T, sink, batch, together)
            if routed is not None and group.routed:
                function = routed
            stubs.enter_context(replaced_submodule(ffn.module, name, ModuleStub(function)))
        ffn.module(x_BLH)


def computes_together(device: torch.device) -> bool:
    """Whether the experts of a group are computed at once: a CPU's cache would hold none of it."""
    return device.type != "cpu"


def _stand_in(
    group: ExpertGroup,
    observer: Observer | Callable[[ExpertCall], None] | None,
    mask_T: torch.Tensor | None,
    sink: Sink | None,
    batch: int,
    together: bool,
) -> Callable[..., torch.Tensor]:
    """What is called in the place of a group's module."""
    if sink is not None and not sink.takes(group):
        sink = None
    if observer is None and sink is None:
        return lambda x, *_: torch.zeros_like(x)
    if together and group.goes_together and isinstance(observer, Observer | None):
        return partial(_together, group, observer, sink, batch)
    one_by_one = _routed if group.routed else _mlp
    return partial(one_by_one, group, observer, mask_T, sink, batch)


def _together(
    group: ExpertGroup,
    observer: Observer | None,
    sink: Sink | None,
    batch: int,
    x: torch.Tensor,
    index_TK: torch.Tensor | None = None,
    weight_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    x_RH = x.reshape(-1, x.shape[-1])
    if index_TK is None:
        rows = mlp_rows(len(x_RH), x.device)
        a_R = group.weight(x_RH)
        a_R = None if a_R is None else rows.filled(a_R[:, None])[:, 0]
    else:
        rows = routed_rows(index_TK, len(group.widths))
        if observer is not None:
            observer.waited(batch)
        x_RH, a_R = rows.inputs(x_RH), rows.weights(weight_TK) * group.scale
    gates, ups = group.gates_and_ups(x_RH, rows)
    call = GroupCall(group, batch, rows, x_RH, gates, ups, a_R, keeps_phi=sink is not None)
    if sink is not None:
        sink.together(call)
    if observer is not None:
        observer.together(call)
    return torch.zeros_like(x)


def run_expert(
    group: RoutedExperts,
    expert: int,
    observer: Observer | Callable[[ExpertCall], None] | None,
    sink: Sink | None,
    batch: int,
    tokens_N: torch.Tensor,
    x_NH: torch.Tensor,
    a_N: torch.Tensor,
    shown_N: torch.Tensor | None,
) -> None:
    """Compute one routed expert on its tokens of a batch; `shown_N` is False for padding."""
    a_N, h_NW = a_N.float() * group.scale, group.activations(expert, x_NH)
    if sink is not None:
        sink(group, expert, tokens_N, (h_NW * a_N[:, None]).to(x_NH.dtype), a_N)
    if observer is None:
        return
    if shown_N is not None:
        tokens_N, x_NH, h_NW, a_N = (t[shown_N] for t in (tokens_N, x_NH, h_NW, a_N))
    if len(a_N):
        observer(ExpertCall(group, expert, batch, tokens_N, x_NH, h_NW, a_N))


def _routed(
    group: RoutedExperts,
    observer: Observer | None,
    mask_T: torch.Tensor | None,
    sink: Sink | None,
    batch: int,
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    top_k, experts = index_TK.shape[-1], len(group.widths)
    index_S, shown_S = index_TK.reshape(-1), None
    if mask_T is not None and sink is None:  # padding is nobody's
        index_S = index_S.where(mask_T.repeat_interleave(top_k), experts)
    order_S, end_E = sorted_slots(index_S, experts)
    counts = counts_of(end_E)
    order_S = order_S[: sum(counts)]
    token_S = order_S // top_k
    if mask_T is not None and sink is not None:
        shown_S = mask_T[token_S]
    a_S = weight_TK.reshape(-1).index_select(0, order_S).float()
    # an accelerator has room for the inputs of all experts, and loses time with every launch
    x_SH = x_TH.index_select(0, token_S) if x_TH.device.type != "cpu" else None
    first = 0
    for expert, count in enumerate(counts):
        here = slice(first, first + count)
        first += count
        if not count:
            continue
        tokens_N = token_S[here]
        x_NH = x_TH.index_select(0, tokens_N) if x_SH is None else x_SH[here]
        shown_N = None if shown_S is None else shown_S[here]
        run_expert(group, expert, observer, sink, batch, tokens_N, x_NH, a_S[here], shown_N)
    return torch.zeros_like(x_TH)


def _mlp(
    group: MlpExpert,
    observer: Observer | None,
    mask_T: torch.Tensor | None,
    sink: Sink | None,
    batch: int,
    x: torch.Tensor,
) -> torch.Tensor:
    x_NH, tokens_N = x.reshape(-1, x.shape[-1]), None
    if mask_T is not None:
        tokens_N = mask_T.nonzero().squeeze(1)
    if sink is None and mask_T is not None:
        x_NH = x_NH[mask_T]
    h_NW, a_N = group.activations(0, x_NH), group.weight(x_NH)
    if sink is not None:
        phi_NW = h_NW if a_N is None else h_NW * a_N[:, None]
        sink(group, 0, None, phi_NW.to(x.dtype), a_N)
        if mask_T is not None:
            x_NH, h_NW = x_NH[mask_T], h_NW[mask_T]
            a_N = None if a_N is None else a_N[mask_T]
    if observer is not None:
        observer(ExpertCall(group, 0, batch, tokens_N, x_NH, h_NW, a_N))
    return torch.zeros_like(x)


class ModuleStub(nn.Module):
    """A module that calls a function; stands in for a part of a layer while the layer runs."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.function(*args, **kwargs)


@contextmanager
def replaced_submodule(parent: nn.Module, name: str, stand_in: nn.Module) -> Iterator[None]:
    """Put `stand_in` in the place of a submodule for the length of a block."""
    original = getattr(parent, name)
    setattr(parent, name, stand_in)
    try:
        yield
    finally:
        setattr(parent, name, original)


def unwrap(output: Any) -> torch.Tensor:
    """Hidden states of a decoder layer, which returns a tensor or, in some families, a tuple."""
    return output[0] if isinstance(output, tuple) else output
