"""All experts of a group on the tokens of one batch, computed together.

Shapes: R rows of all experts, E experts, W width of one expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from camera.moe.experts.group import ExpertGroup
from camera.moe.grouped.phi import Phi, phi_of
from camera.moe.grouped.rows import GroupRows
from camera.moe.observer import ExpertCall
from camera.moe.pool import sum_dtype


@dataclass(frozen=True)
class GroupCall:
    """What `ExpertCall` is of one expert, of all experts of a group; no padding among the tokens.

    x_RH inputs, gate_RW and up_RW what gate and up make of them, all in the model's precision;
    a_R routing weights, fp32 (None for 1). Rows that are nobody's are 0 in all of them, but in
    those of an MLP with biases; `keeps_phi` whether phi is asked for.
    """

    group: ExpertGroup
    batch: int
    rows: GroupRows
    x_RH: torch.Tensor
    gate_RW: torch.Tensor
    up_RW: torch.Tensor
    a_R: torch.Tensor | None
    keeps_phi: bool

    @cached_property
    def _found(self) -> Phi:
        return phi_of(self.gate_RW, self.up_RW, self.a_R, self.group.act_fn, self.keeps_phi)

    @property
    def phi_RW(self) -> torch.Tensor:
        """phi in the model's precision; where `keeps_phi`."""
        return self._found.phi_RW

    @property
    def h2_R(self) -> torch.Tensor:
        """|h|^2 of every row's activations, before the routing weight."""
        return self._found.h2_R

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum (in `sum_dtype`) and maximum over each expert's tokens of phi^2, both [E, W]."""
        dtype, found = sum_dtype(self.x_RH.device), self._found
        sum2_EMW = self.rows.by_expert(found.sum2_BW)
        return sum2_EMW.sum(1, dtype=dtype), self.rows.by_expert(found.max2_BW).amax(1)

    def activations(self, row_N: torch.Tensor | slice) -> torch.Tensor:
        """h_NW of these rows, fp32."""
        return self.group.act_fn(self.gate_RW[row_N].float()) * self.up_RW[row_N].float()

    def each(self) -> Iterator[ExpertCall]:
        """Each expert that tokens reach; its activations are computed with it."""
        for expert, (count, (first, _)) in enumerate(
            zip(self.rows.counts, self.rows.bounds, strict=True)
        ):
            here = slice(first, first + count)
            if count:
                tokens_N = None if self.rows.row_TK is None else self.rows.token_R[here]
                a_N = None if self.a_R is None else self.a_R[here]
                h_NW = self.activations(here)
                yield ExpertCall(
                    self.group, expert, self.batch, tokens_N, self.x_RH[here], h_NW, a_N
                )
