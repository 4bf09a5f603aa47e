"""The slots of a batch as rows of one table, expert after expert.

Shapes: T tokens, K experts per token, S = T * K slots, E experts, R rows, B = R / BLOCK blocks of
rows, W width of one expert, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch.nn import functional as F

from camera.moe.grouped.slots import counts_of, sorted_slots

BLOCK = 32  # rows that are summed up together: no block has rows of two experts


@dataclass(frozen=True)
class GroupRows:
    """Where each expert's tokens stand; its rows are filled up to whole blocks with nobody's.

    tokens: T. counts: tokens of each expert; filled_E: rows of each, on the device. token_R: the
    token of each row, T for nobody's. row_TK: the row of each slot; None where every token is a row
    (an MLP), in their order.
    """

    tokens: int
    counts: list[int]
    filled_E: torch.Tensor
    token_R: torch.Tensor
    row_TK: torch.Tensor | None

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """First and last row of every expert, filled up."""
        return list(pairwise(accumulate((_filled(n) for n in self.counts), initial=0)))

    def inputs(self, x_TH: torch.Tensor) -> torch.Tensor:
        """x_RH: each row's token; zeros where it is nobody's."""
        return F.pad(x_TH, (0, 0, 0, 1)).index_select(0, self.token_R)

    def filled(self, out_TW: torch.Tensor) -> torch.Tensor:
        """Rows of what an MLP makes of every token: zeros where they are nobody's."""
        missing = len(self.token_R) - len(out_TW)
        return F.pad(out_TW, (0, 0, 0, missing)) if missing else out_TW

    def weights(self, weight_TK: torch.Tensor) -> torch.Tensor:
        """a_R: each row's routing weight, fp32; 0 where it is nobody's."""
        a_R = torch.zeros(len(self.token_R), device=weight_TK.device)
        return a_R.index_copy_(0, self.row_TK.reshape(-1), weight_TK.reshape(-1).float())

    def of_experts(self, value_E: torch.Tensor) -> torch.Tensor:
        """Each row's value, of its expert's."""
        return value_E.repeat_interleave(self.filled_E, output_size=len(self.token_R))

    def by_expert(self, part_BW: torch.Tensor) -> torch.Tensor:
        """[E, M, W]: what is known of each block, by expert; zeros from its last block on."""
        if len(self.counts) == 1:
            return part_BW[None]
        blocks_E = self.filled_E // BLOCK
        most = max(_filled(count) for count in self.counts) // BLOCK
        step_M = torch.arange(most, device=part_BW.device)
        index_EM = (blocks_E.cumsum(0) - blocks_E)[:, None] + step_M
        index_EM = index_EM.where(step_M < blocks_E[:, None], len(part_BW))
        found = F.pad(part_BW, (0, 0, 0, 1)).index_select(0, index_EM.view(-1))
        return found.view(*index_EM.shape, -1)

    def add_up(self, out_RH: torch.Tensor) -> torch.Tensor:
        """y_TH: the sum of each token's rows, without atomics."""
        if self.row_TK is None:
            return out_RH[: self.tokens]
        return F.embedding_bag(self.row_TK, out_RH, mode="sum")


def routed_rows(index_TK: torch.Tensor, experts: int) -> GroupRows:
    """Rows of routed experts, each one's tokens in their order; waits for the device once."""
    tokens, top_k = index_TK.shape
    index_S = index_TK.reshape(-1)
    order_S, end_E = sorted_slots(index_S, experts)
    counts = counts_of(end_E)
    start_E = F.pad(end_E[:-1], (1, 0))
    filled_E = (end_E - start_E + BLOCK - 1) // BLOCK * BLOCK
    shift_E = filled_E.cumsum(0) - filled_E - start_E
    step_S = torch.arange(len(order_S), device=index_TK.device)
    row_S = step_S + shift_E.index_select(0, index_S.index_select(0, order_S))
    rows = sum(_filled(count) for count in counts)
    token_R = torch.full((rows,), tokens, device=index_TK.device)
    token_R.index_copy_(0, row_S, order_S // top_k)
    row_TK = torch.empty_like(row_S).index_copy_(0, order_S, row_S).view(tokens, top_k)
    return GroupRows(tokens, counts, filled_E, token_R, row_TK)


def mlp_rows(tokens: int, device: torch.device) -> GroupRows:
    """Rows of an MLP, which sees every token."""
    rows = _filled(tokens)
    token_R = torch.arange(rows, device=device).clamp_(max=tokens)
    return GroupRows(tokens, [tokens], torch.full((1,), rows, device=device), token_R, None)


def _filled(count: int) -> int:
    return -(-count // BLOCK) * BLOCK
