"""D2-MoE: a layer's routed experts as one merged base and low-rank deltas."""

from bisect import bisect_left
from dataclasses import dataclass
from math import floor
from typing import Any, ClassVar, Literal

import torch

from baselines.factorization.layer_factors import (
    DeltaObserver,
    Factoring,
    FisherObserver,
    LayerDelta,
    routed_group,
)
from camera.checkpoint.formats.delta import DeltaExperts
from camera.method import Method, Outcome
from camera.moe.budget import SPARSITY_OF, Budget, to_remove
from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError

MERGES = ("fisher_freq", "fisher", "freq", "mean")


@dataclass
class D2Moe(Method):
    """D2-MoE: W_e = W_base + A_e B_e, the base a weighted mean, the deltas cut to one rank.

    `merge` says by what the mean is weighted (Fisher and selection counts, either, or neither);
    `pp_ratio` is the share of intermediate channels that the base gives up; the rank, the same in
    all projections, experts and layers, is the smallest that removes no more than `sparsity` of
    `sparsity_of` (moe | model | routed). `damping` of the Grams is in units of their mean diagonal.
    Statistics are those of the original model. Source: D2-MoE (ICML 2025).
    """

    name: ClassVar[str] = "d2_moe"
    calibrates: ClassVar[bool] = True

    sparsity: float
    sparsity_of: Literal["moe", "model", "routed"] = "moe"
    merge: Literal["fisher_freq", "fisher", "freq", "mean"] = "fisher_freq"
    pp_ratio: float = 0.0
    damping: float = 1e-6

    @property
    def backward(self) -> bool:
        """Whether the base's weights need gradients."""
        return self.merge.startswith("fisher")

    @property
    def one_shot(self) -> bool:
        return True

    def check(self, budget: Budget) -> None:
        if not 0 < self.sparsity < 1:
            raise CameraError(f"sparsity={self.sparsity} must lie between 0 and 1, both excluded.")
        for key, value, known in (
            ("sparsity_of", self.sparsity_of, SPARSITY_OF),
            ("merge", self.merge, MERGES),
        ):
            if value not in known:
                raise CameraError(f"{key}={value} is none of {', '.join(known)}.")
        if not 0 <= self.pp_ratio < 1:
            raise CameraError(f"pp_ratio={self.pp_ratio} must be at least 0 and below 1.")
        if self.damping < 0:
            raise CameraError(f"damping={self.damping} must not be negative.")
        self._rank = self.rank(budget)

    def rank(self, budget: Budget) -> int:
        """The smallest rank that removes no more than the parameters asked for, by bisection.

        What a rank removes is counted from the tensors that a layer is stored as. Raises
        CameraError if even rank 1 keeps too much, naming the largest sparsity.
        """
        hidden, shapes = self._shapes(budget)
        whole = getattr(budget.dense, self.sparsity_of)
        asked = self.sparsity * whole + 0.5  # half a parameter: floats

        def removed(rank: int) -> int:
            sizes = {shape: self._size(hidden, *shape, rank) for shape in set(shapes)}
            return budget.dense.routed - sum(sizes[shape] for shape in shapes)

        if removed(1) < asked - 1:
            raise CameraError(
                f"sparsity={self.sparsity} of '{self.sparsity_of}' can't be reached: the largest "
                f"possible for this model with pp_ratio={self.pp_ratio} is "
                f"{floor(removed(1) / whole * 1e4) / 1e4}."
            )
        ranks = range(1, min(hidden, *(width for _, width in shapes)))
        return 1 + bisect_left(ranks, True, key=lambda rank: removed(rank) <= asked)

    def statistics_key(self) -> dict[str, Any]:
        return {"kind": LayerDelta.kind, **self.settings()}

    def observer(self, index: int, ffn: FeedForward) -> DeltaObserver:
        width = routed_group(ffn).widths[0]
        how = Factoring(
            by_counts=self.merge in ("fisher_freq", "freq"),
            base_width=self._base_width(width),
            rank=self._rank,
            damping=self.damping,
        )
        observer = FisherObserver if self.backward else DeltaObserver
        return observer(ffn, how)

    def compress(self, index: int, ffn: FeedForward, seen: LayerDelta, budget: Budget) -> Outcome:
        group = routed_group(ffn)
        down = group.down(0)
        hidden, width = down.shape
        base_width, rank = seen.down_proj.shape[1], seen.down_left.shape[2]
        sizes = hidden, width, len(group.widths), base_width, rank
        module = DeltaExperts(*sizes, group.act_fn, "meta", down.dtype)
        factors = {n: t.to(down.device, down.dtype) for n, t in seen.factors().items()}
        module.load_state_dict(factors, assign=True)
        setattr(ffn.module, ffn.family.experts, module.requires_grad_(False))
        report = {
            "rank": rank,
            "base_width": base_width,
            "output_error": dict(zip(("gate", "up", "down"), seen.error_P.tolist(), strict=True)),
            "experts_without_tokens": sum(path == group.path for path, _ in seen.unreached()),
        }
        return Outcome({group.path: module.spec()}, report=report)

    def _base_width(self, width: int) -> int:
        return width - to_remove(width, self.pp_ratio)

    def _size(self, hidden: int, experts: int, width: int, rank: int) -> int:
        sizes = hidden, width, experts, self._base_width(width), rank
        module = DeltaExperts(*sizes, torch.nn.Identity(), "meta")
        return sum(parameter.numel() for parameter in module.parameters())

    def _shapes(self, budget: Budget) -> tuple[int, list[tuple[int, int]]]:
        """Hidden size, and (experts, width) of every layer's routed experts."""
        shapes = []
        for index, pool in budget.layers.items():
            pairs = zip(pool.widths, pool.routed, strict=True)
            widths = [width for width, routed in pairs if routed]
            if len(set(widths)) > 1:
                raise CameraError(
                    f"method=d2_moe needs experts of one width, and those of layer {index} have "
                    f"{min(widths)} to {max(widths)}: compress the original model."
                )
            if widths:
                shapes.append((len(widths), widths[0]))
        if not shapes:
            raise CameraError(
                f"method=d2_moe merges routed experts, and this {budget.model_type} model has "
                "none: choose another method, or a model with experts."
            )
        weights = 3 * sum(experts * width for experts, width in shapes)
        return budget.dense.routed // weights, shapes
