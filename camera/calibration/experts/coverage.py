"""Which experts each source of a mixture reaches, counted beside what a pass observes.

Shapes: S sources, E experts of the pool, N tokens of one expert, R rows of all experts of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.moe.grouped.rows import BLOCK
from camera.moe.pool import PoolIndex
from camera.runtime.distributed import all_combined, world

if TYPE_CHECKING:
    from camera.moe.feed_forward import FeedForward
    from camera.moe.grouped.call import GroupCall
    from camera.moe.observer import ExpertCall

SourceTokens = dict[str, dict[str, list[int]]]
"""By layer and source the tokens that each expert of the pool saw."""


class BySource:
    """Builds a spec's observers, and counts in `found` the tokens of every source beside them.

    `dealt` are the sources of this process's samples, which come in batches of `size` of `length`
    tokens.
    """

    def __init__(
        self,
        spec: ObserverSpec,
        names: list[str],
        dealt: list[int],
        size: int,
        length: int,
        found: SourceTokens,
    ):
        self.spec, self.names, self.dealt = spec, names, torch.tensor(dealt)
        self.size, self.length, self.found = size, length, found

    def build(self, index: int, ffn: FeedForward) -> SourceObserver:
        """The observer of layer `index`, with counts."""
        return SourceObserver(self, self.spec.build(index, ffn), index, ffn)

    def finish(self, seen: LayerStatistics, ffn: FeedForward) -> LayerStatistics:
        """What is kept of a layer, as the spec says."""
        return self.spec.finish(seen, ffn)


class SourceObserver(LayerObserver):
    """Shows all to the observer `inner`, and counts the tokens of each source and expert."""

    def __init__(self, spec: BySource, inner: LayerObserver, index: int, ffn: FeedForward):
        self._spec, self._inner, self._layer = spec, inner, index
        self.reads_hidden = inner.reads_hidden
        self._pool = PoolIndex(ffn)
        device = next(ffn.module.parameters()).device
        self._dealt = spec.dealt.to(device)
        self._source_S1 = torch.arange(len(spec.names), device=device)[:, None]
        shape = (len(spec.names), self._pool.experts)
        self._counts_SE = torch.zeros(shape, dtype=torch.int64, device=device)

    def ffn_input(self, *arguments: Any) -> None:
        self._inner.ffn_input(*arguments)

    def __call__(self, call: ExpertCall) -> None:
        self._inner(call)
        device = self._dealt.device
        tokens_N = call.tokens_N
        if tokens_N is None:
            tokens_N = torch.arange(len(call.x_NH), device=device)
        sample_N = call.batch * self._spec.size + tokens_N.to(device) // self._spec.length
        counts_S = (self._dealt[sample_N][None] == self._source_S1).sum(1)
        self._counts_SE[:, self._pool.expert(call.group.path, call.expert)] += counts_S

    def together(self, call: GroupCall) -> None:
        self._inner.together(call)
        rows, token_R, known = call.rows, call.rows.token_R, len(self._dealt)
        sample_R = call.batch * self._spec.size + token_R // self._spec.length
        source_R = self._dealt[sample_R.clamp_(max=known - 1)]
        ours_RS = (source_R[:, None] == self._source_S1.T) & (token_R < rows.tokens)[:, None]
        ours_BS = ours_RS.view(-1, BLOCK, len(self._source_S1)).sum(1)
        first = self._pool.expert(call.group.path, 0)
        self._counts_SE[:, first : first + len(rows.counts)] += rows.by_expert(ours_BS).sum(1).T

    def result(self) -> LayerStatistics:
        """What `inner` says; the counts of all processes go to `found`."""
        counts_SE = self._counts_SE.cpu()
        if world() > 1:
            counts_SE = all_combined(counts_SE, "sum")
        counts = zip(self._spec.names, counts_SE.tolist(), strict=True)
        self._spec.found[str(self._layer)] = dict(counts)
        return self._inner.result()
