"""Stored bits of quantised experts, before anything is quantised.

Shapes: N micro-experts of a pool, E experts of the pool, B numbers of bits (0, 1, ... 8).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from camera.checkpoint.formats.packed.codes import MAX_BITS, packed_bytes
from camera.checkpoint.formats.packed.layout import (
    groups_of,
    index_bits,
    index_dtype,
    metadata_bits,
)


class StoredGroups(Protocol):
    """What a quantiser stores beside its codes."""

    group_size: int | None
    scattered: bool

    def metadata_bits(self, bits: int) -> int:
        """Bits beside the codes of one group."""


@dataclass(frozen=True)
class StoredBits:
    """Bits on disk of the quantised experts of a pool, metadata included.

    A line of n codes of b bits in groups of g takes n b + ceil(n / g) m(b), m of `metadata_bits`.
    The codes of one segment of an expert fill whole bytes, as `PackedLayout` stores them. `widths`
    are those of every expert; `group_size` None: one group per line. `scattered` matrices, whose
    groups aren't neighbours, store the order of their columns too. `metadata_B`: m at 0, 1, ... 8
    bits, for a quantiser with other metadata.
    """

    hidden: int
    widths: tuple[int, ...]
    group_size: int | None = 128
    sym: bool = False
    scattered: bool = False
    metadata_B: tuple[int, ...] | None = None

    @classmethod
    def of(cls, quantizer: "StoredGroups", hidden: int, widths: Sequence[int]) -> "StoredBits":
        """For a quantiser: its group size, its metadata, and whether its groups are scattered."""
        beside = tuple(quantizer.metadata_bits(bits) for bits in range(MAX_BITS + 1))
        return cls(hidden, tuple(widths), quantizer.group_size, False, quantizer.scattered, beside)

    @property
    def weights(self) -> int:
        """Weights of the pool: gate, up and down of every micro-expert."""
        return 3 * self.hidden * sum(self.widths)

    @property
    def micro_experts(self) -> int:
        return sum(self.widths)

    def counts(self, bits_N: torch.Tensor) -> torch.Tensor:
        """Micro-experts of each expert (row) at 0, 1, ... 8 bits (column), int64."""
        levels, experts = MAX_BITS + 1, len(self.widths)
        expert_N = torch.repeat_interleave(torch.arange(experts), torch.tensor(self.widths))
        return torch.bincount(expert_N * levels + bits_N, minlength=experts * levels).view(
            experts, levels
        )

    def total(self, bits_N: torch.Tensor) -> int:
        """Bits of a plan by micro-expert: rows of gate and up, column segments of down."""
        return self._total(self.counts(bits_N))

    def _total(self, counts_EB: torch.Tensor) -> int:
        hidden_EB = torch.full_like(counts_EB, self.hidden)
        gate_up = self.segments(2 * counts_EB, hidden_EB)
        total = gate_up + self.segments(hidden_EB * (counts_EB > 0), counts_EB)
        if self.scattered:
            total += 2 * len(self.widths) * index_bits(self.hidden)
            widest = index_dtype(max(self.widths, default=0))
            total += 8 * sum(self.widths) * widest.itemsize
        return total

    def total_by_columns(self, gate_up_EB: torch.Tensor, down_EB: torch.Tensor) -> int:
        """Bits where gate and up are cut by their input columns too, and store the columns' order
        unless all have the same bits.

        The numbers of columns of each expert at 0, 1, ... 8 bits.
        """
        width_EB = torch.tensor(self.widths)[:, None]
        hidden_EB = torch.full_like(down_EB, self.hidden)
        gate_up = self.segments(2 * width_EB * (gate_up_EB > 0), gate_up_EB)
        down = self.segments(hidden_EB * (down_EB > 0), down_EB)
        if not mixed(gate_up_EB):
            return gate_up + down
        return gate_up + down + 2 * len(self.widths) * index_bits(self.hidden)

    def segments(self, lines_EB: torch.Tensor, length_EB: torch.Tensor) -> int:
        """Bits of segments, by their lines and the codes of a line at 0, 1, ... 8 bits."""
        beside_B = self.metadata_B
        if beside_B is None:
            beside_B = [metadata_bits(bits, self.sym) for bits in range(MAX_BITS + 1)]
        beside_B = torch.tensor(beside_B)[: lines_EB.shape[1]]
        groups_EB = groups_of(length_EB, self.group_size)
        codes_EB = 8 * packed_bytes(lines_EB * length_EB, torch.arange(lines_EB.shape[1]))
        return int((codes_EB + lines_EB * groups_EB * beside_B).sum())

    def average(self, bits_N: torch.Tensor) -> float:
        """Stored bits per weight of a plan; removed weights count in the denominator."""
        return self.total(bits_N) / max(self.weights, 1)

    def uniform_average(self, bits: int) -> float:
        """Stored bits per weight if all micro-experts have the same."""
        counts_EB = torch.zeros(len(self.widths), MAX_BITS + 1, dtype=torch.int64)
        counts_EB[:, bits] = torch.tensor(self.widths)
        return self._total(counts_EB) / max(self.weights, 1)


def mixed(counts_EB: torch.Tensor) -> bool:
    """Whether any expert has lines of several numbers of bits."""
    return bool(((counts_EB > 0).sum(1) > 1).any())
