"""Camera-Q-dagger, Camera-Q's ablation: the bits of an expert's three matrices don't match.

https://arxiv.org/abs/2508.02322

Shapes: N micro-experts of a layer's pool, E experts of the pool, H hidden, W width of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from camera.moe.pool import layer_seed
from camera.quantization.camera_q import CameraQ
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from torch import Tensor

    from camera.calibration.hessians import HessianStatistics
    from camera.checkpoint.formats.packed.footprint import StoredBits
    from camera.method import Plan
    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward
    from camera.quantization.plans.layer_bits import LayerBits


@dataclass(frozen=True)
class CameraQDagger(CameraQ):
    """Camera-Q with unmatched bit widths in the three matrices.

    split channels: each matrix is divided along its own input, gate and up by the energy of their
    input channels [(1 - alpha) |X_c|_2^2 + alpha |X_c|_inf^2] |W_c|^2, down by micro-expert energy;
    the shares are Camera-Q's in all three. split shuffle: Camera-Q's numbers of rows and columns of
    every expert, assigned at random in each matrix. The orders that are stored count as bits.
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

    def plan_layer(
        self, index: int, ffn: FeedForward, seen: HessianStatistics, budget: Budget, plan: Plan
    ) -> LayerBits:
        if self.split == "channels":
            return self._by_channels(index, ffn, seen, plan)
        import torch

        from camera.quantization.plans.layer_bits import ExpertBits, LayerBits

        matched = super().plan_layer(index, ffn, seen, budget, plan)
        generator = torch.Generator().manual_seed(layer_seed(self.seed, index))

        def shuffled(bits: Tensor) -> Tensor:
            return bits[torch.randperm(len(bits), generator=generator)]

        experts = [
            ExpertBits("rows", shuffled(e.gate), shuffled(e.up), shuffled(e.down))
            for e in matched.experts
        ]
        return LayerBits(experts, matched.group_size)

    def stored(
        self, pool: StoredBits, bits_N: Tensor, boundaries: Sequence[int], levels: Sequence[int]
    ) -> float:
        import torch

        from camera.checkpoint.formats.packed.codes import MAX_BITS
        from camera.checkpoint.formats.packed.footprint import index_bits, mixed

        if self.split == "shuffle":
            whole = super().stored(pool, bits_N, boundaries, levels)
            if not mixed(pool.counts(bits_N)):
                return whole
            return whole + sum(2 * index_bits(width) for width in pool.widths)
        channels = _channel_bits(pool.hidden, boundaries, len(bits_N), levels)
        counts_B = torch.bincount(channels, minlength=MAX_BITS + 1)
        counts_EB = counts_B.expand(len(pool.widths), -1)
        return pool.total_by_columns(counts_EB, pool.counts(bits_N))

    def _by_channels(
        self, index: int, ffn: FeedForward, seen: HessianStatistics, plan: Plan
    ) -> LayerBits:
        import torch

        from camera.quantization.plans.bit_plan import ranking
        from camera.quantization.plans.layer_bits import ExpertBits, LayerBits

        energy_N, pool = self.importance(index, seen, plan), self.pool_of(ffn)
        levels = plan.shared["levels"]
        errors = self.errors(ffn, seen, pool, levels)
        bits_N, boundaries, group_size = self.allocate(
            energy_N, pool, levels, errors, where=f"layer {index}"
        )
        falling_H = _channel_bits(pool.hidden, boundaries, len(bits_N), levels)
        channel_EH, widths = seen.channel_energy(self.alpha), ffn.widths
        parts = iter(zip(bits_N.split(widths), energy_N.split(widths), channel_EH, strict=True))
        experts = []
        for group in ffn.groups:
            for expert in range(len(group.widths)):
                bits_W, energy_W, channel_H = next(parts)
                both = []
                for weight in group.gate_up(expert):
                    norm_H = weight.detach().float().square().sum(0).double().cpu()
                    bits_H = torch.empty_like(falling_H)
                    bits_H[ranking(channel_H * norm_H, [pool.hidden], "layer")] = falling_H
                    both.append(bits_H)
                experts.append(ExpertBits("columns", *both, bits_W, energy_W))
        return LayerBits(experts, group_size)


def _channel_bits(
    hidden: int, boundaries: Sequence[int], micro_experts: int, levels: Sequence[int]
) -> Tensor:
    """Bits of input channels in falling order: the shares that the boundaries give
    micro-experts."""
    import torch

    from camera.quantization.plans.bit_plan import bits_of_ranking

    inside = [round(cut * hidden / max(micro_experts, 1)) for cut in boundaries]
    return bits_of_ranking(torch.arange(hidden), [hidden], levels, inside)
