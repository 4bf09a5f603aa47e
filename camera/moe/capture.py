"""One forward pass of a layer's FFN, with each expert's activations passed to an observer.

The layer's own router decides; its experts are replaced, for the length of the call, by stubs that
compute only the tokens routed to them. Nothing of the routing is computed here.

Shapes: B samples, L tokens of a sample, T = B * L tokens, H hidden, K experts per token,
S = T * K slots, N tokens of one expert, W width of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from camera.moe.feed_forward import ExpertGroup, FeedForward, MlpExpert, RoutedExperts
from camera.moe.observer import Observer
from camera.moe.pool import KeptRows
from camera.moe.routing import counts_of, sorted_slots

Sink = Callable[[ExpertGroup, int, torch.Tensor | None, torch.Tensor, torch.Tensor | None], None]
"""sink(group, expert, tokens_N, phi_NW, a_N): phi in the model's precision, and the routing weights
that it contains (None for 1); no tokens_N for all tokens."""

RoutedCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""call(x_TH, index_TK, weight_TK) -> y_TH: what native routed experts are called with."""


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One expert on the tokens of one batch; padding left out.

    tokens_N are positions in the batch (None: all of them), x_NH inputs in the model's precision,
    h_NW activations (fp32) before the routing weight a_N (None for 1).
    """

    group: ExpertGroup
    expert: int
    batch: int
    tokens_N: torch.Tensor | None
    x_NH: torch.Tensor
    h_NW: torch.Tensor
    a_N: torch.Tensor | None

    @property
    def phi_NW(self) -> torch.Tensor:
        """Micro-expert outputs phi = a * h."""
        return self.h_NW if self.a_N is None else self.h_NW * self.a_N[:, None]


class OutputSum:
    """A sink that adds the FFN's output up: y_TH = sum_i phi_i * w_i^down over the whole pool."""

    def __init__(self, x_BLH: torch.Tensor):
        self.y_TH = torch.zeros_like(x_BLH).flatten(0, -2)

    def __call__(
        self,
        group: ExpertGroup,
        expert: int,
        tokens_N: torch.Tensor | None,
        phi_NW: torch.Tensor,
        a_N: torch.Tensor | None = None,
    ) -> None:
        self.add(tokens_N, group.project(expert, phi_NW, a_N))

    def add(self, tokens_N: torch.Tensor | None, out: torch.Tensor) -> None:
        """Add the output of one expert on its tokens (None: all)."""
        out = out.to(self.y_TH.device)
        if tokens_N is None:
            self.y_TH += out
        else:
            # a token reaches an expert once, and index_add_ takes many times as long on a CPU
            self.y_TH.index_copy_(0, tokens_N, self.y_TH.index_select(0, tokens_N) + out)


@dataclass
class ExpertPhi:
    """phi of one expert on the tokens of one batch (None: all of them), and its routing weights
    (None: 1)."""

    path: str
    expert: int
    tokens_N: torch.Tensor | None
    phi_NW: torch.Tensor
    a_N: torch.Tensor | None = None


class PhiRecord:
    """A sink that keeps phi, so that a layer pruned afterwards needs only `down_proj` to finish."""

    def __init__(self) -> None:
        self.calls: list[ExpertPhi] = []

    def __call__(
        self,
        group: ExpertGroup,
        expert: int,
        tokens_N: torch.Tensor | None,
        phi_NW: torch.Tensor,
        a_N: torch.Tensor | None = None,
    ) -> None:
        self.calls.append(ExpertPhi(group.path, expert, tokens_N, phi_NW, a_N))


def project_phi(
    ffn: FeedForward, calls: list[ExpertPhi], kept: KeptRows, output: OutputSum
) -> torch.Tensor:
    """y_TH of the pruned layer `ffn` from the phi of the whole one; `kept` micro-experts stayed."""
    groups = {group.path: group for group in ffn.groups}
    for call in calls:
        rows = kept[call.path][call.expert]
        phi_NW = call.phi_NW.index_select(1, rows)
        output(groups[call.path], call.expert, call.tokens_N, phi_NW, call.a_N)
    return output.y_TH


def run_ffn(
    ffn: FeedForward,
    x_BLH: torch.Tensor,
    observer: Observer | Callable[[ExpertCall], None] | None = None,
    *,
    mask_T: torch.Tensor | None = None,
    sink: Sink | None = None,
    batch: int = 0,
    routed: RoutedCall | None = None,
) -> None:
    """Call `observer`, and `sink` if given, for every expert that x reaches.

    Where routed experts are evaluated later, `routed` stands for them. Tokens where `mask_T` is
    False (padding) are routed as the model would, and reach the sink; the observer never sees them.
    """
    if not ffn.is_moe:
        _mlp(ffn.groups[0], observer, mask_T, sink, batch, x_BLH)
        return
    with ExitStack() as stubs:
        for group in ffn.groups:
            shared = isinstance(group, MlpExpert)
            name = ffn.family.shared if shared else ffn.family.experts
            function = partial(_mlp if shared else _routed, group, observer, mask_T, sink, batch)
            if routed is not None and not shared:
                function = routed
            stubs.enter_context(replaced_submodule(ffn.module, name, ModuleStub(function)))
        ffn.module(x_BLH)


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
