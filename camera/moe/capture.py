"""Run a layer's feed-forward part once and see what each expert of its pool does.

The layer's own router decides; its experts are replaced, for the length of the call, by taps that
compute only the tokens routed to them. Nothing of the routing is computed here.

Shapes: B samples, L tokens of a sample, T = B * L tokens, H hidden, K experts per token, N tokens
of one expert, W width of one expert.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from camera.moe.feed_forward import ExpertGroup, FeedForward, MlpExpert, RoutedExperts
from camera.moe.pool import Kept
from camera.moe.routing import routed_slots

Observer = Callable[[ExpertGroup, int, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""observer(group, expert, x_NH, h_NW, a_N): the tokens one expert saw, its activations (fp32) and
routing weights (None for 1); the micro-expert outputs are phi_NW = a_N * h_NW."""

Sink = Callable[[ExpertGroup, int, torch.Tensor | None, torch.Tensor], None]
"""sink(group, expert, tokens_N, phi_NW): phi in the model's precision; None for all tokens."""


def unobserved(*_: object) -> None:
    """The observer that looks at nothing."""


class Output:
    """A sink that adds the FFN's output up: y_TH = sum_i phi_i * w_i^down over the whole pool."""

    def __init__(self, x_BLH: torch.Tensor):
        self.y_TH = torch.zeros_like(x_BLH).flatten(0, -2)

    def __call__(
        self, group: ExpertGroup, expert: int, tokens_N: torch.Tensor | None, phi_NW: torch.Tensor
    ) -> None:
        out = group.project(expert, phi_NW).to(self.y_TH.device)
        if tokens_N is None:
            self.y_TH += out
        else:
            # a token reaches an expert once, and index_add_ takes many times as long on a CPU
            self.y_TH.index_copy_(0, tokens_N, self.y_TH.index_select(0, tokens_N) + out)


class Trace:
    """A sink that keeps phi, so that a layer cut afterwards needs only `down_proj` to finish."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.seen: list[tuple[str, int, torch.Tensor | None, torch.Tensor]] = []

    def __call__(
        self, group: ExpertGroup, expert: int, tokens_N: torch.Tensor | None, phi_NW: torch.Tensor
    ) -> None:
        self.seen.append((group.path, expert, tokens_N, phi_NW))

    def finish(self, ffn: FeedForward, kept: Kept, output: Output) -> torch.Tensor:
        """y_TH of the cut layer `ffn`, of whose micro-experts `kept` stayed."""
        groups = {group.path: group for group in ffn.groups}
        for path, expert, tokens_N, phi_NW in self.seen:
            rows = kept[path][expert].to(phi_NW.device)
            output(groups[path], expert, tokens_N, phi_NW.index_select(1, rows))
        return output.y_TH


def observe(
    ffn: FeedForward,
    x_BLH: torch.Tensor,
    observer: Observer,
    mask_T: torch.Tensor | None = None,
    sink: Sink | None = None,
    record: Callable[..., torch.Tensor] | None = None,
    counts_T: torch.Tensor | None = None,
) -> None:
    """Call `observer`, and `sink` if given, for every expert that x reaches.

    Where routed experts are to be looked at later, `record` stands for them: it is called with
    mask_T, counts_T, sink, x_TH, index_TK, weight_TK. With `counts_T` the observer sees routing
    weights times that: phi as much as the token counts.
    Tokens where `mask_T` is False (padding) are routed as the model would, and reach the sink, but
    the observer never sees them.
    """
    if not ffn.is_moe:
        _mlp(ffn.groups[0], observer, mask_T, counts_T, sink, x_BLH)
        return
    with ExitStack() as taps:
        for group in ffn.groups:
            shared = isinstance(group, MlpExpert)
            name = ffn.family.shared if shared else ffn.family.experts
            function = partial(_mlp if shared else _routed, group, observer, mask_T, counts_T, sink)
            if record is not None and not shared:
                function = partial(record, mask_T, counts_T, sink)
            taps.enter_context(swapped(ffn.module, name, Tap(function)))
        ffn.module(x_BLH)


class Tap(nn.Module):
    """A module that calls a function: stands in for a part of a layer while the layer runs."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def _routed(
    group: RoutedExperts,
    observer: Observer,
    mask_T: torch.Tensor | None,
    counts_T: torch.Tensor | None,
    sink: Sink | None,
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    top_k, weight = index_TK.shape[-1], weight_TK.reshape(-1)
    for expert, slots in routed_slots(index_TK, len(group.widths)):
        if sink is None and mask_T is not None:
            slots = slots[mask_T[slots // top_k]]
        tokens_N = slots // top_k
        shown_N = mask_T[tokens_N] if mask_T is not None else None
        x_NH, a_N = x_TH.index_select(0, tokens_N), weight.index_select(0, slots)
        counts_N = None if counts_T is None else counts_T[tokens_N]
        one_expert(group, expert, observer, shown_N, counts_N, sink, tokens_N, x_NH, a_N)
    return torch.zeros_like(x_TH)


def one_expert(
    group: RoutedExperts,
    expert: int,
    observer: Observer,
    shown_N: torch.Tensor | None,
    counts_N: torch.Tensor | None,
    sink: Sink | None,
    tokens_N: torch.Tensor,
    x_NH: torch.Tensor,
    a_N: torch.Tensor,
) -> None:
    """Compute one expert on its tokens and show them; `shown_N` is False for padding."""
    a_N, h_NW = a_N.float(), group.activations(expert, x_NH)
    if sink is not None:
        sink(group, expert, tokens_N, (h_NW * a_N[:, None]).to(x_NH.dtype))
    if counts_N is not None:
        a_N = a_N * counts_N
    if sink is not None and shown_N is not None:
        x_NH, h_NW, a_N = x_NH[shown_N], h_NW[shown_N], a_N[shown_N]
    if len(a_N):
        observer(group, expert, x_NH, h_NW, a_N)


def _mlp(
    group: MlpExpert,
    observer: Observer,
    mask_T: torch.Tensor | None,
    counts_T: torch.Tensor | None,
    sink: Sink | None,
    x: torch.Tensor,
) -> torch.Tensor:
    x_NH = x.reshape(-1, x.shape[-1])
    if sink is None and mask_T is not None:
        x_NH = x_NH[mask_T]
    h_NW, a_N = group.activations(0, x_NH), group.scale(x_NH)
    if sink is not None:
        phi_NW = h_NW if a_N is None else h_NW * a_N[:, None]
        sink(group, 0, None, phi_NW.to(x.dtype))
        if mask_T is not None:
            x_NH, h_NW = x_NH[mask_T], h_NW[mask_T]
            a_N = None if a_N is None else a_N[mask_T]
    if counts_T is not None:
        counts_N = counts_T if mask_T is None else counts_T[mask_T]
        a_N = counts_N if a_N is None else a_N * counts_N
    observer(group, 0, x_NH, h_NW, a_N)
    return torch.zeros_like(x)


@contextmanager
def swapped(parent: nn.Module, name: str, stand_in: nn.Module) -> Iterator[None]:
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
