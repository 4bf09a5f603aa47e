"""Where the activations of a layer's experts go: into its output, or kept until it is pruned.

Shapes: B samples, L tokens of a sample, T = B * L, H hidden, N tokens of one expert, R rows of all
experts, W width of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from camera.moe.experts.group import ExpertGroup, MlpExpert
from camera.moe.feed_forward import FeedForward
from camera.moe.grouped.call import GroupCall
from camera.moe.grouped.products import filling_pays, grouped_products, in_one_kernel
from camera.moe.grouped.rows import GroupRows
from camera.moe.pool import KeptRows


class Sink:
    """Base of what takes phi, in the model's precision."""

    def takes(self, group: ExpertGroup) -> bool:
        """Whether it asks for the phi of a group."""
        return True

    def __call__(
        self,
        group: ExpertGroup,
        expert: int,
        tokens_N: torch.Tensor | None,
        phi_NW: torch.Tensor,
        a_N: torch.Tensor | None = None,
    ) -> None:
        """One expert's, on these tokens of the batch (None: on all); a_N: the routing weights that
        phi contains (None: 1)."""
        raise NotImplementedError

    def together(self, call: GroupCall) -> None:
        """All experts' of a group, where they are computed together."""
        raise NotImplementedError


class OutputSum(Sink):
    """Adds the FFN's output up: y_TH = sum_i phi_i * w_i^down over the whole pool."""

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

    def together(self, call: GroupCall) -> None:
        self.add_rows(call.group.outputs(call.phi_RW, call.rows), call.rows)

    def add(self, tokens_N: torch.Tensor | None, out: torch.Tensor) -> None:
        """What one expert puts out on its tokens (None: all)."""
        out = out.to(self.y_TH.device)
        if tokens_N is None:
            self.y_TH += out
        else:
            # a token reaches an expert once, and index_add_ takes many times as long on a CPU
            self.y_TH.index_copy_(0, tokens_N, self.y_TH.index_select(0, tokens_N) + out)

    def add_rows(self, out_RH: torch.Tensor, rows: GroupRows) -> None:
        """What all experts of a group put out."""
        self.y_TH += rows.add_up(out_RH).to(self.y_TH.device)


@dataclass
class ExpertPhi:
    """phi of one expert on the tokens of one batch (None: all of them), and its routing weights
    (None: 1)."""

    path: str
    expert: int
    tokens_N: torch.Tensor | None
    phi_NW: torch.Tensor
    a_N: torch.Tensor | None = None


@dataclass
class GroupPhi:
    """phi of all experts of a group on the tokens of one batch; they have no biases, but an MLP."""

    path: str
    rows: GroupRows
    phi_RW: torch.Tensor


class PhiRecord(Sink):
    """Keeps phi, so that a layer pruned afterwards needs only `down_proj` to finish.

    `routed`: of routed experts alone. `apart`: each expert's in memory of its own, to be freed one
    by one.
    """

    def __init__(self, *, routed: bool = False, apart: bool = False) -> None:
        self.routed, self.apart = routed, apart
        self.calls: list[ExpertPhi | GroupPhi] = []

    def takes(self, group: ExpertGroup) -> bool:
        return group.routed or not self.routed

    def __call__(
        self,
        group: ExpertGroup,
        expert: int,
        tokens_N: torch.Tensor | None,
        phi_NW: torch.Tensor,
        a_N: torch.Tensor | None = None,
    ) -> None:
        self.calls.append(ExpertPhi(group.path, expert, tokens_N, phi_NW, a_N))

    def together(self, call: GroupCall) -> None:
        if not self.apart:
            self.calls.append(GroupPhi(call.group.path, call.rows, call.phi_RW))
            return
        rows, everyone = call.rows, call.rows.row_TK is None
        for expert, (count, (first, _)) in enumerate(zip(rows.counts, rows.bounds, strict=True)):
            if count:
                here = slice(first, first + count)
                tokens_N = None if everyone else rows.token_R[here].clone()
                a_N = None if call.a_R is None else call.a_R[here].clone()
                self(call.group, expert, tokens_N, call.phi_RW[here].clone(), a_N)


class PhiProjection:
    """The output of the pruned layer `ffn` from the phi of the whole one; `kept` micro-experts
    stayed. Groups whose phi wasn't kept run as the modules that they now are."""

    def __init__(self, ffn: FeedForward, kept: KeptRows):
        self._groups, self._kept = {group.path: group for group in ffn.groups}, kept
        self._whole: dict[str, torch.Tensor] = {}

    def add(self, call: ExpertPhi | GroupPhi, output: OutputSum) -> None:
        """Add what comes of one record."""
        group, kept = self._groups[call.path], self._kept[call.path]
        if isinstance(call, ExpertPhi):
            phi_NW = call.phi_NW.index_select(1, kept[call.expert])
            output(group, call.expert, call.tokens_N, phi_NW, call.a_N)
        elif isinstance(group, MlpExpert):
            out_RH = group.outputs(call.phi_RW.index_select(1, kept[0]), call.rows)
            output.add_rows(out_RH, call.rows)
        else:
            output.add_rows(self._routed(call, group, kept), call.rows)

    def add_rest(self, x_BLH: torch.Tensor, output: OutputSum) -> None:
        """Add what the groups that aren't routed put out, computed from the FFN's inputs."""
        for group in self._groups.values():
            if isinstance(group, MlpExpert):
                output.y_TH += group.output(x_BLH.flatten(0, -2))

    def _routed(self, call: GroupPhi, group: ExpertGroup, kept: list[torch.Tensor]) -> torch.Tensor:
        phi_RW = call.phi_RW
        hidden, bounds = group.down(0).shape[0], call.rows.bounds
        filled = filling_pays(phi_RW.device, bounds, phi_RW.shape[1] * hidden)
        if filled or in_one_kernel(phi_RW):
            down_EWH = self._whole_down(group, kept, phi_RW.shape[1])
            return grouped_products(phi_RW, down_EWH, bounds)
        out_RH = phi_RW.new_empty(len(phi_RW), hidden)
        for expert, (first, last) in enumerate(bounds):
            if last > first:
                phi_NW = phi_RW[first:last].index_select(1, kept[expert])
                torch.mm(phi_NW, group.down(expert).t(), out=out_RH[first:last])
        return out_RH

    def _whole_down(self, group: ExpertGroup, kept: list[torch.Tensor], width: int) -> torch.Tensor:
        """down_EWH with zeros in the place of what was removed: one kernel for all experts takes
        less time than a choice of columns and a product for each."""
        if group.path not in self._whole:
            like_HW = group.down(0)
            down_EWH = like_HW.new_zeros(len(kept), width, len(like_HW))
            for expert, rows in enumerate(kept):
                down_EWH[expert].index_copy_(0, rows, group.down(expert).t())
            self._whole[group.path] = down_EWH
        return self._whole[group.path]
