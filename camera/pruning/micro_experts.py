"""Camera-P, and the plans it must be compared with: random and nothing at all.

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from camera.calibration.statistics import LayerStatistics
from camera.calibration.trials import TRIALS, Trials, trial_bytes
from camera.compensation.settings import TokenWeights, Refit, Scope, Target
from camera.method import Method, Outcome
from camera.moe.budget import Budget, to_remove
from camera.moe.feed_forward import FeedForward
from camera.moe.pool import kept_rows
from camera.pruning.allocation import allocate
from camera.pruning.ranking import below_floor, keep_highest
from camera.pruning.slicing import slice_layer
from camera.runtime.errors import CameraError

RankScope = Literal["layer", "global", "measured"]


@dataclass
class MicroExpertPruning(Method):
    """Removes the n = int(N * ratio) lowest-scored micro-experts, of every layer's pool or of all.

    The ratio is solved from `sparsity` of `sparsity_of` (moe | model | routed; with `routed` the
    shared experts are left alone). `rank_scope` layer gives every layer the same ratio, global
    ranks all layers together, by scores of the dense model, measured takes from each layer what
    trial cuts, by the same scores, were found to cost the model least (`camera.calibration.trials`).
    `width_multiple` rounds each expert's kept width for kernels, `min_width` keeps every expert at
    least that wide, `layer_floor` every layer's pool. `compensate` refits the output weights of
    what stays: see `camera.compensation.least_squares`.
    """

    slices: ClassVar[bool] = True

    sparsity: float
    sparsity_of: Literal["moe", "model", "routed"] = "moe"
    rank_scope: RankScope = "layer"
    width_multiple: int = 1
    min_width: int = 0
    layer_floor: float = 0.0
    compensate: Literal["none", Scope] = "none"
    target: Target = "layer"
    token_weights: TokenWeights = "relative"
    ridges: Sequence[float] = Refit.ridges
    sweeps: int = Refit.sweeps
    held_out: float = Refit.held_out

    def __post_init__(self) -> None:
        self._plans: dict[int, torch.Tensor] = {}

    @property
    def one_shot(self) -> bool:
        return self.backward or self.rank_scope != "layer"

    @property
    def asks_head(self) -> bool:
        return self.backward or self.rank_scope == "measured"

    @property
    def compensation(self) -> Refit | None:
        if self.compensate == "none":
            return None
        return Refit(
            self.compensate,
            self.target,
            self.token_weights,
            self.ridges,
            self.sweeps,
            self.held_out,
        )

    def check(self, budget: Budget) -> None:
        if self.width_multiple < 1 or self.min_width < 0:
            raise CameraError(
                f"width_multiple={self.width_multiple} must be at least 1 and "
                f"min_width={self.min_width} at least 0."
            )
        if self.rank_scope not in get_args(RankScope):
            raise CameraError(
                f"rank_scope={self.rank_scope} is none of {', '.join(get_args(RankScope))}."
            )
        if self.rank_scope == "measured" and not self.calibrates:
            raise CameraError(
                f"rank_scope=measured tries cuts on calibration text, which method {self.name} "
                "doesn't read: use rank_scope=global or layer."
            )
        ratio = self._ratio(budget)
        if not 0 <= self.layer_floor <= 1 - ratio:
            raise CameraError(
                f"layer_floor={self.layer_floor} must lie between 0 and the {1 - ratio:.3f} of all "
                "micro-experts that stay."
            )

    def holds(self, budget: Budget) -> int:
        if self.rank_scope != "measured":
            return 0
        return trial_bytes(len(budget.layers), budget.hidden)

    def scores(self, index: int, seen: LayerStatistics | None, micro_experts: int) -> torch.Tensor:
        """Of a layer's micro-experts, fp64 [N]: the lowest go."""
        raise NotImplementedError

    def trials(self, statistics: dict[int, LayerStatistics], budget: Budget) -> Trials:
        if self.rank_scope != "measured":
            return {}
        found = {}
        for i in budget.layers:
            counts = [to_remove(self._prunable(budget, [i]), share) for share in TRIALS]
            found[i] = [self.plan(statistics, budget, [i], count)[i] for count in counts]
        return found

    def prepare(self, statistics: dict[int, LayerStatistics], budget: Budget) -> None:
        if self.rank_scope == "global":
            self._plans = self.plan(statistics, budget, list(budget.layers))
        elif self.rank_scope == "measured":
            layers = list(budget.layers)
            gone = allocate(
                [self.cuts[i].removed_C.tolist() for i in layers],
                [self.cuts[i].cost_C.tolist() for i in layers],
                to_remove(self._prunable(budget, layers), self._ratio(budget)),
                self.width_multiple,
            )
            for i, number in zip(layers, gone, strict=True):
                self._plans |= self.plan(statistics, budget, [i], number)

    def compress(
        self, index: int, ffn: FeedForward, seen: LayerStatistics | None, budget: Budget
    ) -> Outcome:
        keep_N = self._plans.get(index)
        if keep_N is None:
            keep_N = self.plan({index: seen}, budget, [index])[index]
        kept = kept_rows(ffn, keep_N)
        return Outcome(slice_layer(ffn, kept), kept)

    def plan(
        self,
        statistics: dict[int, LayerStatistics],
        budget: Budget,
        layers: list[int],
        remove: int | None = None,
    ) -> dict[int, torch.Tensor]:
        """bool [N] of each of these layers, ranked together: which micro-experts stay.

        So many go as `remove` says, by default the asked sparsity of them.
        """
        pools = [budget.layers[i] for i in layers]
        sizes = [sum(pool.widths) for pool in pools]
        scores = [self.scores(i, statistics.get(i), n) for i, n in zip(layers, sizes, strict=True)]
        widths = [width for pool in pools for width in pool.widths]
        candidates_N = None
        if self.sparsity_of == "routed":
            routed = torch.tensor([routed for pool in pools for routed in pool.routed])
            candidates_N = torch.repeat_interleave(routed, torch.tensor(widths))
        if self.layer_floor:
            free_N = torch.cat([below_floor(score_N, self.layer_floor) for score_N in scores])
            candidates_N = free_N if candidates_N is None else candidates_N & free_N
        if remove is None:
            remove = to_remove(self._prunable(budget, layers), self._ratio(budget))
        keep_N = keep_highest(
            torch.cat(scores),
            widths,
            remove,
            width_multiple=self.width_multiple,
            min_width=self.min_width,
            candidates_N=candidates_N,
        )
        return dict(zip(layers, keep_N.split(sizes), strict=True))

    def _prunable(self, budget: Budget, layers: list[int]) -> int:
        """Micro-experts of these layers that `sparsity` counts."""
        return sum(
            width
            for pool in (budget.layers[i] for i in layers)
            for width, routed in zip(pool.widths, pool.routed, strict=True)
            if routed or self.sparsity_of != "routed"
        )

    def _ratio(self, budget: Budget) -> float:
        return budget.pool_ratio(
            self.sparsity, self.sparsity_of, self.min_width, self.width_multiple
        )
