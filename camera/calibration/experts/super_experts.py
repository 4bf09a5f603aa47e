"""Super experts: the few whose outputs have extreme outliers, without which a model breaks down.

Their outputs are looked at beside whatever a pass observes. Source: Super Experts (ICLR 2026,
arXiv 2507.23279), massive activations as in arXiv 2402.17762.

Shapes: E experts of the pool, N tokens of one expert, W its width, H hidden, R rows of all experts
of a group.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.moe.pool import PoolIndex
from camera.runtime.device.accelerator import current_stream, has_own_memory
from camera.runtime.distributed import all_combined, world

if TYPE_CHECKING:
    from camera.calibration.experts.coverage import BySource
    from camera.moe.experts.group import ExpertGroup
    from camera.moe.feed_forward import FeedForward
    from camera.moe.grouped.call import GroupCall
    from camera.moe.observer import ExpertCall

MASSIVE = 100.0  # an activation is massive from this magnitude on
MEDIANS = 1000.0  # ... and from so many medians of the hidden states on
TOP_SHARE = 0.005  # super experts lie above the 99.5th percentile of all experts' outputs
OF_LARGEST = 0.1  # ... and above this part of the largest output
FIRST_LAYERS = 0.75  # of all layers: massive activations form there
SAMPLED = 512  # tokens whose hidden states give the median

Outliers = dict[str, dict[str, Any]]
"""By layer the `median` of |hidden states|, and the `largest` |output| of experts by number in the
pool, of those above `MASSIVE`."""


@dataclass
class WithOutliers:
    """Builds a spec's observers, and notes in `found` the outliers of experts beside them."""

    spec: ObserverSpec | BySource
    found: Outliers

    def stream(self, index: int, batches: list[torch.Tensor]) -> None:
        """Take the median of the hidden states that a layer's output is added to, [B, L, H] of the
        first batch."""
        sample = torch.zeros(())
        for hidden_BLH in batches[:1]:
            sample = hidden_BLH.flatten(0, -2)[:SAMPLED].float().abs().median().cpu()
        if world() > 1:
            sample = all_combined(sample, "max")
        self.found[str(index)] = {"median": sample.item(), "largest": {}}

    def build(self, index: int, ffn: FeedForward) -> OutlierObserver:
        """The observer of layer `index`, with a look at outputs."""
        return OutlierObserver(self, self.spec.build(index, ffn), index, ffn)

    def finish(self, seen: LayerStatistics, ffn: FeedForward) -> LayerStatistics:
        """What is kept of a layer, as the spec says."""
        return self.spec.finish(seen, ffn)


class OutlierObserver(LayerObserver):
    """Shows all to the observer `inner`, and keeps the largest output of every expert.

    A_e = max over tokens and channels of |f_e(x)|, before the routing weight.
    """

    def __init__(self, spec: WithOutliers, inner: LayerObserver, index: int, ffn: FeedForward):
        self._spec, self._inner, self._layer = spec, inner, str(index)
        self.reads_hidden = inner.reads_hidden
        self._pool = PoolIndex(ffn)
        device = next(ffn.module.parameters()).device
        self._largest_E = torch.zeros(self._pool.experts, device=device)
        self._reach: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._group_reach: dict[str, list[torch.Tensor]] = {}
        self._routes = any(group.routed for group in ffn.groups)
        # of a batch's groups: the bounds of their rows, and whether any is massive, on its way
        self._bounds: list[tuple[GroupCall, torch.Tensor, torch.Tensor]] = []
        self._asked: torch.Event | None = None  # after the last of these

    def ffn_input(self, *arguments: Any) -> None:
        self._inner.ffn_input(*arguments)

    def waited(self, batch: int) -> None:
        self._look_back(batch)
        self._inner.waited(batch)

    @torch.no_grad()
    def __call__(self, call: ExpertCall) -> None:
        self._inner(call)
        expert = self._pool.expert(call.group.path, call.expert)
        h_NW = call.h_NW
        if h_NW.device.type == "cpu":  # elsewhere a look at the bound would wait for the device
            # |y_c| <= |h| |row c of down| + |b_c|: most are cleared without their outputs
            if expert not in self._reach:
                self._reach[expert] = _reach(call.group, call.expert)
            norm, bias = self._reach[expert]
            h_NW = h_NW[torch.linalg.vector_norm(h_NW, dim=1) * norm + bias > MASSIVE]
            if not len(h_NW):
                return
        self._look(call.group, call.expert, h_NW.to(call.x_NH.dtype))

    @torch.no_grad()
    def together(self, call: GroupCall) -> None:
        if not self._routes:  # nobody says where the host waits
            self._look_back(call.batch)
        self._inner.together(call)
        norm_E, bias_E = self._reach_of(call.group)
        bound_R = call.h2_R.sqrt() * call.rows.of_experts(norm_E)
        if call.group.down_bias(0) is not None:
            bias_R = call.rows.of_experts(bias_E)
            bound_R += bias_R.where(call.rows.token_R < call.rows.tokens, 0.0)
        massive = (bound_R > MASSIVE).any().to("cpu", non_blocking=True)
        if has_own_memory(bound_R.device):
            self._asked = current_stream(bound_R.device).record_event()
        self._bounds.append((call, bound_R, massive))

    def _look_back(self, batch: int | None = None) -> None:
        """Look at the rows of batches before this one (None: of all) whose bound doesn't clear
        them; waits only where the device isn't there yet, or to know which rows these are."""
        past = [bound for bound in self._bounds if bound[0].batch != batch]
        self._bounds = [bound for bound in self._bounds if bound[0].batch == batch]
        if not past:
            return
        if self._asked is not None and not self._asked.query():
            self._asked.synchronize()
        calls, bounds, massive = zip(*past, strict=True)
        if not any(map(bool, massive)):
            return
        row_N, first = (torch.cat(bounds) > MASSIVE).nonzero().squeeze(1), 0
        rows = row_N.tolist()
        for call, bound_R in zip(calls, bounds, strict=True):
            last = first + len(bound_R)
            ours = slice(bisect_left(rows, first), bisect_left(rows, last))
            ends = [first + end for _, end in call.rows.bounds]
            experts = [bisect_right(ends, row) for row in rows[ours]]
            h_NW = call.activations(row_N[ours] - first).to(call.x_RH.dtype)
            for expert in sorted(set(experts)):
                here = slice(bisect_left(experts, expert), bisect_right(experts, expert))
                self._look(call.group, expert, h_NW[here])
            first = last

    def _reach_of(self, group: ExpertGroup) -> list[torch.Tensor]:
        """`_reach` of each expert of a group."""
        if group.path not in self._group_reach:
            found = [_reach(group, expert) for expert in range(len(group.widths))]
            self._group_reach[group.path] = [torch.stack(part) for part in zip(*found, strict=True)]
        return self._group_reach[group.path]

    def _look(self, group: ExpertGroup, expert: int, h_NW: torch.Tensor) -> None:
        """Count the outputs of an expert on these activations, in the model's precision."""
        largest = group.project(expert, h_NW).abs().amax().float()
        here = self._pool.expert(group.path, expert)
        self._largest_E[here] = torch.maximum(self._largest_E[here], largest)

    def result(self) -> LayerStatistics:
        """What `inner` says; the outliers of all processes go to `found`."""
        self._look_back()
        largest_E = self._largest_E.cpu()
        if world() > 1:
            largest_E = all_combined(largest_E, "max")
        largest = {str(e): a for e, a in enumerate(largest_E.tolist()) if a > MASSIVE}
        self._spec.found[self._layer]["largest"] = largest
        return self._inner.result()


def _reach(group: ExpertGroup, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """max over the rows c of down of |row c|, and of |its bias|; fp32."""
    norm_H = torch.linalg.vector_norm(group.down(expert), dim=1, dtype=torch.float32)
    bias_H = group.down_bias(expert)
    largest = norm_H.new_zeros(()) if bias_H is None else bias_H.abs().amax().float()
    return norm_H.amax(), largest


def super_experts(found: Outliers, experts: int, layers: int) -> dict[int, list[int]]:
    """By layer the super experts, by their numbers in the pool; only layers that have any.

    Expert e of layer l is one if A_le is above the 99.5th percentile of all `experts` of the model,
    above a tenth of the largest, and a massive activation (above 100, and above 1,000 medians of
    the hidden states), and l is among the first 75 % of the `layers`. What later layers add isn't
    known while they are still to come: then those so far are all.
    """
    everyone = [
        (a, int(layer), int(expert))
        for layer, seen in found.items()
        for expert, a in seen["largest"].items()
    ]
    everyone.sort(reverse=True)
    largest = everyone[0][0] if everyone else 0.0
    chosen: dict[int, list[int]] = {}
    for a, layer, expert in everyone[: ceil(TOP_SHARE * (experts - 1))]:
        massive = a > MEDIANS * found[str(layer)]["median"]
        if massive and a > OF_LARGEST * largest and layer < round(FIRST_LAYERS * layers):
            chosen.setdefault(layer, []).append(expert)
    return {layer: sorted(chosen[layer]) for layer in sorted(chosen)}
