"""One width for all routed experts of a model and one for its shared ones, as serving engines ask.

Shapes: N micro-experts of a layer's pool, W one more than the width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from camera.moe.families import family_of
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    import torch

    from camera.method import LayerPlan
    from camera.moe.budget import Budget, SparsityOf
    from camera.moe.pool import LayerPool
    from camera.pruning.plan import KeptMicroExperts

TOLERANCE = 0.01  # how far the sparsity of whole multiples may be from the one asked for
MULTIPLES = (128, 64, 32, 16, 8)  # that kernels like, the best first; below 8 some refuse
SLACK = 0.05  # more score may be lost for such a multiple, as a share of the least


@dataclass(frozen=True)
class UniformWidths:
    """Kept widths of routed experts and of the others (shared experts, or dense FFNs); 0: none."""

    routed: int
    shared: int

    @classmethod
    def left(cls, budget: Budget, layers: Mapping[int, LayerPlan]) -> UniformWidths:
        """The widths that finished plans of all layers leave."""
        found = {True: 0, False: 0}
        for index, plan in layers.items():
            kept = cast("KeptMicroExperts", plan).kept_widths
            found |= dict(zip(budget.layers[index].routed, kept, strict=True))
        return cls(found[True], found[False])

    @property
    def multiple(self) -> int:
        """The largest of `MULTIPLES` that divides both; 1 where none does."""
        fitting = (m for m in MULTIPLES if self.routed % m == 0 and self.shared % m == 0)
        return next(fitting, 1)

    def of(self, routed: Sequence[bool]) -> list[int]:
        """Width of every expert of a pool."""
        return [self.routed if is_routed else self.shared for is_routed in routed]

    def config(self, model_type: str) -> dict[str, int]:
        """The keys of config.json that hold these widths."""
        keys = family_of(model_type).keys
        if not self.routed:
            return {keys.dense_width: self.shared}
        found = {keys.width: self.routed}
        if self.shared and keys.shared_count is None:
            found[keys.shared_width] = self.shared
        return found


def refuse_other_ranking(rank_scope: str, layer_floor: float) -> None:
    """CameraError for settings that need another ranking than one within each expert."""
    for key, value, wrong, right in (
        ("rank_scope", rank_scope, rank_scope == "measured", "global or layer"),
        ("layer_floor", layer_floor, layer_floor, "0.0"),
    ):
        if wrong:
            raise CameraError(
                f"expert_widths=uniform ranks within each expert, which {key}={value} "
                f"contradicts: set {key}={right}."
            )


def uniform_widths(
    budget: Budget, sparsity: float, sparsity_of: SparsityOf, multiple: int, min_width: int
) -> UniformWidths:
    """The widths of which both kinds lose the asked share, within `TOLERANCE`.

    They are multiples of `multiple`, and of the largest of `MULTIPLES` that fits. CameraError,
    naming the sparsities on both sides, where nothing fits; and for a model whose experts are of
    unequal widths already.
    """
    kinds = _Kinds.of(budget, sparsity_of)
    ratio = budget.pool_ratio(sparsity, sparsity_of, min_width, multiple)
    for step in _steps(multiple):
        pairs = [
            (kinds.removed(w) * sparsity / ratio, w) for w in kinds.around(ratio, step, min_width)
        ]
        near, widths = min(pairs, key=lambda pair: abs(pair[0] - sparsity))
        if abs(near - sparsity) <= TOLERANCE:
            return widths
    sides = " or ".join(f"{found:.4f} (width {w.routed or w.shared})" for found, w in pairs)
    raise CameraError(
        f"sparsity={sparsity} of '{sparsity_of}' lies between the widths that are multiples of "
        f"width_multiple={multiple}: use sparsity={sides}, or a smaller width_multiple."
    )


def uniform_choices(
    budget: Budget, sparsity: float, sparsity_of: SparsityOf, multiple: int, min_width: int
) -> list[UniformWidths]:
    """All widths of the two kinds, multiples of `multiple`, of about the asked sparsity.

    To every routed width the shared one that comes next to it, if it is within `TOLERANCE`. Where
    one width decides (one kind of experts, or a family whose kinds are tied) there is one choice,
    that of `uniform_widths`, and CameraError as there.
    """
    kinds = _Kinds.of(budget, sparsity_of)
    ratio = budget.pool_ratio(sparsity, sparsity_of, min_width, multiple)
    found: list[UniformWidths] = []
    for step in _steps(multiple) if kinds.free else ():
        found += kinds.pairs(ratio, step, min_width)
    allowed = TOLERANCE * ratio / sparsity
    found = [widths for widths in found if abs(kinds.removed(widths) - ratio) <= allowed]
    return found or [uniform_widths(budget, sparsity, sparsity_of, multiple, min_width)]


def least_loss(
    choices: Sequence[UniformWidths],
    scores: Sequence[torch.Tensor],
    pools: Sequence[LayerPool],
) -> UniformWidths:
    """The choice whose removed micro-experts have the least sum of scores, over these layers.

    For a better multiple the sum may be larger by the share `SLACK`. Negative scores, of experts
    that no token reached, count as 0.
    """
    if len(choices) == 1:
        return choices[0]
    routed_W, shared_W = (_lost(scores, pools, routed) for routed in (True, False))
    losses = [float(routed_W[widths.routed] + shared_W[widths.shared]) for widths in choices]
    near = [
        (-widths.multiple, loss, index)
        for index, (widths, loss) in enumerate(zip(choices, losses, strict=True))
        if loss <= (1 + SLACK) * min(losses)
    ]
    return choices[min(near)[-1]]


def keep_uniform(score_N: torch.Tensor, widths: Sequence[int], kept: Sequence[int]) -> torch.Tensor:
    """bool [N]: of every expert its `kept` highest-scored micro-experts; of equals the first goes
    first."""
    import torch

    keep_N = torch.ones(len(score_N), dtype=torch.bool)
    start = 0
    for width, stay in zip(widths, kept, strict=True):
        ascending = torch.argsort(score_N[start : start + width], stable=True)
        keep_N[start + ascending[: width - stay]] = False
        start += width
    return keep_N


@dataclass(frozen=True)
class _Kinds:
    """The two kinds of experts: their widths before (0: none), their numbers over all layers.

    per_routed: the shared width is so many times the routed one; whole: shared experts stay.
    """

    routed: int
    shared: int
    experts: dict[bool, int]  # by whether they are routed
    per_routed: int | None
    whole: bool

    @classmethod
    def of(cls, budget: Budget, sparsity_of: SparsityOf) -> _Kinds:
        routed, shared = _width(budget, True), _width(budget, False)
        keys = family_of(budget.model_type).keys
        one_key = keys.shared_count is not None or keys.shared_width == keys.width
        tied = bool(routed and shared) and one_key
        if tied and sparsity_of == "routed":
            raise CameraError(
                f"expert_widths=uniform: a model of type {budget.model_type} has one width for "
                "routed and shared experts: use sparsity_of=moe."
            )
        all_routed = [is_routed for pool in budget.layers.values() for is_routed in pool.routed]
        experts = {kind: all_routed.count(kind) for kind in (True, False)}
        per_routed = shared // routed if tied else None
        return cls(routed, shared, experts, per_routed, sparsity_of == "routed")

    @property
    def free(self) -> bool:
        """Whether there are two widths to choose."""
        return bool(self.routed and self.shared) and self.per_routed is None and not self.whole

    def widths(self, first: int, shared: int) -> UniformWidths:
        """Those where the deciding kind keeps `first`, and shared experts, if free, `shared`."""
        if not self.routed:
            return UniformWidths(0, first)
        if self.per_routed is not None:
            return UniformWidths(first, self.per_routed * first)
        return UniformWidths(first, self.shared if self.whole else min(shared, self.shared))

    def removed(self, widths: UniformWidths) -> float:
        """The share of the prunable micro-experts that these widths remove."""
        gone = self.experts[True] * (self.routed - widths.routed)
        return (gone + self.experts[False] * (self.shared - widths.shared)) / self._whole

    def around(self, ratio: float, step: int, min_width: int) -> list[UniformWidths]:
        """The two next to this share where both kinds lose it, multiples of `step` or whole."""
        first, least = self.routed or self.shared, _least(step, min_width)
        below = max(least, int((first * (1 - ratio) + 1e-9) // step) * step)
        beside = max(round(self.shared * (1 - ratio) / step) * step, least)
        two = sorted({min(below, first), min(below + step, first)})
        return [self.widths(width, beside) for width in two]

    def pairs(self, ratio: float, step: int, min_width: int) -> list[UniformWidths]:
        """To every routed width the shared one next to this share, multiples of `step` or whole."""
        least, found = _least(step, min_width), []
        for routed in [*range(least, self.routed, step), self.routed]:
            gone = ratio * self._whole - self.experts[True] * (self.routed - routed)
            below = int((self.shared - gone / self.experts[False]) // step) * step
            near = [
                self.widths(routed, max(width, least))
                for width in (below, below + step, self.shared)
            ]
            found.append(min(near, key=lambda widths: abs(self.removed(widths) - ratio)))
        return found

    @property
    def _whole(self) -> int:
        shared = 0 if self.whole else self.experts[False] * self.shared
        return self.experts[True] * self.routed + shared


def _least(step: int, min_width: int) -> int:
    return max(step, -(-min_width // step) * step)


def _steps(multiple: int) -> list[int]:
    """Multiples to try, the best first, `multiple` itself last."""
    return [m for m in MULTIPLES if m % multiple == 0 and m > multiple] + [multiple]


def _lost(scores: Sequence[torch.Tensor], pools: Sequence[LayerPool], routed: bool) -> torch.Tensor:
    """fp64 [W]: sum of the scores that go where every expert of a kind keeps so many."""
    import torch

    total_W = torch.zeros(1, dtype=torch.float64)
    for score_N, pool in zip(scores, pools, strict=True):
        parts = score_N.double().clamp(min=0).split(pool.widths)
        for part, is_routed in zip(parts, pool.routed, strict=True):
            if is_routed == routed:
                gone_W = torch.cat((torch.zeros(1), part.sort().values.cumsum(0))).flip(0)
                total_W = total_W + gone_W
    return total_W


def _width(budget: Budget, routed: bool) -> int:
    widths = {
        width
        for pool in budget.layers.values()
        for width, is_routed in zip(pool.widths, pool.routed, strict=True)
        if is_routed == routed
    }
    if len(widths) > 1:
        raise CameraError(
            f"expert_widths=uniform: the experts have widths from {min(widths)} to {max(widths)} "
            "already: begin with the original model."
        )
    return widths.pop() if widths else 0
