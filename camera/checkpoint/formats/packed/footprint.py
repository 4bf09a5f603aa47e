"""What quantised experts take on disk, known before anything is quantised.

Shapes: N micro-experts of a pool, E experts of the pool, B numbers of bits (0, 1, ... 8).
"""

from dataclasses import dataclass

import torch

MOST_BITS = 8


def metadata_bits(bits: int, sym: bool = False) -> int:
    """Stored bits beside the codes of one group: scale and zero in 16 bits each.

    The 1-bit and the symmetric grids know their zero; 0 bits store nothing.
    """
    return 0 if bits == 0 else 16 if bits == 1 or sym else 32


def index_bits(length: int) -> int:
    """Stored bits of an order of so many rows or columns."""
    return length * (16 if length <= 2**15 else 32)


@dataclass(frozen=True)
class Footprint:
    """What the quantised experts of a pool take on disk, in bits, metadata included.

    A line of n codes of b bits in groups of g takes n b + ceil(n / g) m(b), m of `metadata_bits`;
    codes of one segment of an expert fill whole bytes, as camera/checkpoint/formats/packed/layout.py stores
    them. `widths` are those of every expert, `group_size` None is one group per line; `scattered`
    matrices, whose groups aren't neighbours, store the order of their columns too.
    """

    hidden: int
    widths: tuple[int, ...]
    group_size: int | None = 128
    sym: bool = False
    scattered: bool = False

    @property
    def weights(self) -> int:
        """Weights of the pool: gate, up and down of every micro-expert."""
        return 3 * self.hidden * sum(self.widths)

    @property
    def micro_experts(self) -> int:
        return sum(self.widths)

    def counts(self, bits_N: torch.Tensor) -> torch.Tensor:
        """Micro-experts of each expert (row) at 0, 1, ... 8 bits (column), int64."""
        levels, experts = MOST_BITS + 1, len(self.widths)
        expert_N = torch.repeat_interleave(torch.arange(experts), torch.tensor(self.widths))
        return torch.bincount(expert_N * levels + bits_N, minlength=experts * levels).view(
            experts, levels
        )

    def stored(self, bits_N: torch.Tensor) -> int:
        """Bits of a plan by micro-expert: rows of gate and up, column segments of down."""
        return self._stored(self.counts(bits_N))

    def _stored(self, counts_EB: torch.Tensor) -> int:
        hidden_EB = torch.full_like(counts_EB, self.hidden)
        gate_up = self.segments(2 * counts_EB, hidden_EB)
        total = gate_up + self.segments(hidden_EB * (counts_EB > 0), counts_EB)
        if self.scattered:
            total += 2 * len(self.widths) * index_bits(self.hidden)
            total += sum(map(index_bits, self.widths))
        return total

    def stored_by_columns(self, gate_up_EB: torch.Tensor, down_EB: torch.Tensor) -> int:
        """Bits where gate and up are cut by their input columns too, and store the columns' order.

        The numbers of columns of each expert at 0, 1, ... 8 bits.
        """
        width_EB = torch.tensor(self.widths)[:, None]
        hidden_EB = torch.full_like(down_EB, self.hidden)
        gate_up = self.segments(2 * width_EB * (gate_up_EB > 0), gate_up_EB)
        down = self.segments(hidden_EB * (down_EB > 0), down_EB)
        return gate_up + down + 2 * len(self.widths) * index_bits(self.hidden)

    def segments(self, lines_EB: torch.Tensor, length_EB: torch.Tensor) -> int:
        """Bits of segments of so many lines of so many codes at 0, 1, ... 8 bits."""
        bits_B = torch.arange(lines_EB.shape[1])
        beside_B = torch.tensor([metadata_bits(b, self.sym) for b in bits_B.tolist()])
        step = self.group_size or max(int(length_EB.max()), 1)
        groups_EB = (length_EB + step - 1) // step
        codes_EB = (lines_EB * length_EB * bits_B + 7) // 8 * 8  # whole bytes
        return int((codes_EB + lines_EB * groups_EB * beside_B).sum())

    def average(self, bits_N: torch.Tensor) -> float:
        """Stored bits per weight of a plan; removed weights count in the denominator."""
        return self.stored(bits_N) / max(self.weights, 1)

    def uniform(self, bits: int) -> float:
        """Stored bits per weight if all micro-experts have the same."""
        counts_EB = torch.zeros(len(self.widths), MOST_BITS + 1, dtype=torch.int64)
        counts_EB[:, bits] = torch.tensor(self.widths)
        return self._stored(counts_EB) / max(self.weights, 1)
