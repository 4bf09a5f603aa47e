"""Camera-Q-dagger, Camera-Q's ablation: the bits of an expert's three matrices don't match.

Shapes: N micro-experts of a layer's pool, E experts of the pool, H hidden, W width of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from camera.calibration.hessians import LayerHessians
from camera.checkpoint.formats.packed.footprint import MOST_BITS, Footprint, index_bits
from camera.moe.budget import Budget
from camera.moe.feed_forward import FeedForward
from camera.quantization.base import hidden_size
from camera.quantization.bit_plan import ExpertBits, assign, ranking
from camera.quantization.camera_q import CameraQ
from camera.runtime.errors import CameraError


@dataclass
class CameraQDagger(CameraQ):
    """Camera-Q without what makes it Camera-Q: the bits of the three matrices don't match.

    split channels: each matrix is cut along its own input, gate and up by the energy of their input
    channels [(1 - alpha) |X_c|_2^2 + alpha |X_c|_inf^2] |W_c|^2, down by micro-expert energy; the
    shares are Camera-Q's in all three. split shuffle: Camera-Q's numbers of rows and columns of
    every expert, dealt out at random in each matrix. The orders that are stored count as bits.
    """

    name: ClassVar[str] = "camera_q_dagger"

    split: Literal["channels", "shuffle"] = "channels"
    seed: int = 1234

    def check(self, budget: Budget) -> None:
        if self.split not in ("channels", "shuffle"):
            raise CameraError(f"split={self.split} is none of channels, shuffle.")
        if 0 in (self.group_bits or ()):
            raise CameraError("camera_q_dagger can't remove micro-experts: take 0 off group_bits.")
        if self.rank_scope == "global":
            raise CameraError(
                "camera_q_dagger ranks within a layer or expert: set rank_scope=layer."
            )
        super().check(budget)

    def plan(
        self, index: int, ffn: FeedForward, seen: LayerHessians, budget: Budget
    ) -> tuple[list[ExpertBits], int | None]:
        if self.split == "channels":
            return self._by_channels(index, ffn, seen)
        matched, group_size = super().plan(index, ffn, seen, budget)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)

        def deal(bits: torch.Tensor) -> torch.Tensor:
            return bits[torch.randperm(len(bits), generator=generator)]

        return [
            ExpertBits("rows", deal(e.gate), deal(e.up), deal(e.down)) for e in matched
        ], group_size

    def stored(self, pool: Footprint, bits_N: torch.Tensor, cuts: Sequence[int]) -> float:
        if self.split == "shuffle":
            index = sum(2 * index_bits(width) for width in pool.widths)
            return super().stored(pool, bits_N, cuts) + index
        channels = self._channel_bits(pool.hidden, cuts, len(bits_N))
        counts_B = torch.bincount(channels, minlength=MOST_BITS + 1)
        counts_EB = counts_B.expand(len(pool.widths), -1)
        return pool.stored_by_columns(counts_EB, pool.counts(bits_N))

    def _channel_bits(self, hidden: int, cuts: Sequence[int], micro_experts: int) -> torch.Tensor:
        """Bits of input channels in falling order: the shares that the cuts give micro-experts."""
        inside = [round(cut * hidden / max(micro_experts, 1)) for cut in cuts]
        return assign(torch.arange(hidden), [hidden], self.levels, inside)

    def _by_channels(
        self, index: int, ffn: FeedForward, seen: LayerHessians
    ) -> tuple[list[ExpertBits], int | None]:
        energy_N, widths = self._importance(index, seen), ffn.widths
        pool = Footprint(hidden_size(ffn), tuple(widths), self._group_size(), self.sym)
        bits_N, cuts, group_size = self.allocate(energy_N, pool, self._errors(ffn, seen, pool))
        falling_H = self._channel_bits(pool.hidden, cuts, len(bits_N))
        channel_EH = seen.channel_energy(self.alpha).cpu()
        parts = iter(zip(bits_N.split(widths), energy_N.split(widths), channel_EH, strict=True))
        plan = []
        for group in ffn.groups:
            for expert in range(len(group.widths)):
                bits_W, energy_W, channel_H = next(parts)
                both = []
                for weight in group.gate_up(expert):
                    norm_H = weight.detach().float().square().sum(0).double().cpu()
                    bits_H = torch.empty_like(falling_H)
                    bits_H[ranking(channel_H * norm_H, [pool.hidden], "layer")] = falling_H
                    both.append(bits_H)
                plan.append(ExpertBits("columns", *both, bits_W, energy_W))
        return plan, group_size
