"""Methods that remove whole routed experts, the same number in every layer.

Their result is a plain checkpoint of the model's own type with fewer experts. Shapes: E routed
experts of a layer, N tokens of one expert, H hidden, W width of one expert.
"""

from dataclasses import dataclass
from math import ceil, floor
from typing import Any, ClassVar, Literal

import torch

from baselines.experts.subset_search import keep_best
from camera.calibration.statistics import LayerStatistics
from camera.method import Method, Outcome
from camera.moe.budget import SPARSITY_OF, Budget
from camera.moe.feed_forward import FeedForward
from camera.moe.routing import Routing, routing_of
from camera.pruning.whole_experts import drop_experts, smaller_config
from camera.runtime.errors import CameraError


@dataclass
class ExpertPruning(Method):
    """Removes r whole routed experts of every layer, with their rows of the router.

    r is the largest number (for a group-limited router: multiple of its groups) that doesn't
    exceed `sparsity` of `sparsity_of`: experts are whole, so what is realised is at most that, and
    less by less than one expert (of each group) per layer. Of `moe` and `routed` it is experts
    that count, of `model` their router rows too. Shared experts stay.
    """

    native: ClassVar[bool] = True

    sparsity: float
    sparsity_of: Literal["moe", "model", "routed"] = "moe"

    def check(self, budget: Budget) -> None:
        self.dropped(budget)

    def dropped(self, budget: Budget) -> int:
        """r of every layer; CameraError, naming the nearest possible sparsity, if there is none."""
        if not 0 < self.sparsity < 1:
            raise CameraError(f"sparsity={self.sparsity} must lie between 0 and 1, both excluded.")
        if self.sparsity_of not in SPARSITY_OF:
            raise CameraError(
                f"sparsity_of={self.sparsity_of} is none of {', '.join(SPARSITY_OF)}."
            )
        routing = self.routing(budget)
        layers = len(budget.layers)
        one = budget.dense.routed // routing.experts + layers * routing.row * (
            self.sparsity_of == "model"
        )
        whole = getattr(budget.dense, self.sparsity_of)
        step = one * routing.groups / whole  # the share that the fewest experts possible make up
        steps, most = floor(self.sparsity / step + 1e-9), routing.most // routing.groups
        if 1 <= steps <= most:
            return steps * routing.groups
        if not most:
            raise CameraError(
                f"method {self.name}: a layer of this {budget.model_type} model has "
                f"{routing.experts} routed experts, none of which its top-{routing.top_k} router "
                "can spare."
            )
        end, number = ("smallest", 1) if steps < 1 else ("largest", most)
        raise CameraError(
            f"sparsity={self.sparsity} of '{self.sparsity_of}' is {steps * routing.groups} of "
            f"{routing.experts} routed experts per layer: the {end} possible for method "
            f"{self.name} is {ceil(number * step * 1e4) / 1e4} ({number * routing.groups} experts; "
            f"the router chooses {routing.top_k}"
            + (f" from {routing.groups} groups of equal size" if routing.groups > 1 else "")
            + ")."
        )

    def routing(self, budget: Budget) -> Routing:
        """What every layer's router asks for; CameraError where no whole experts can go."""
        if not any(any(pool.routed) for pool in budget.layers.values()):
            raise CameraError(
                f"method {self.name} removes whole routed experts and this {budget.model_type} "
                "model has none: use one that removes micro-experts (camera_p, heapr, magnitude)."
            )
        found = {pool.routing for pool in budget.layers.values()}
        if None in found:
            raise CameraError(
                f"method {self.name} removes whole experts of a model's native weights, and this "
                "one is already compressed: start from the original."
            )
        if len(found) > 1:
            raise CameraError(
                f"method {self.name} writes one number of experts for all layers, and this "
                f"{budget.model_type} model's layers differ."
            )
        return found.pop()

    def drop(self, ffn: FeedForward, keep_E: torch.Tensor, **facts: Any) -> Outcome:
        """Remove what `keep_E` lacks; `facts` go into the report with the experts dropped."""
        drop_experts(ffn, keep_E.nonzero().flatten().tolist())
        gone = (~keep_E).nonzero().flatten().tolist()
        return Outcome(modules={}, report={"dropped": gone, **facts})

    def native_config(self, config: Any, budget: Budget) -> dict[str, Any]:
        experts = self.routing(budget).experts
        return smaller_config(config, experts - self.dropped(budget))


@dataclass
class ExpertUse(LayerStatistics):
    """How a layer's routed experts were used by the tokens routed to them.

    gate_E = sum of g_e(x), norm_E = sum of ||f_e(x)||_2, gated_norm_E = sum of their product (all
    fp64), f_e the expert's output before its routing weight g_e; tokens_E counts, over the whole
    pool (shared expert first).
    """

    kind: ClassVar[str] = "expert_use"
    reduced: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tokens_E", "gate_E", "norm_E", "gated_norm_E"), "sum"
    )
    tokens_E: torch.Tensor
    gate_E: torch.Tensor
    norm_E: torch.Tensor
    gated_norm_E: torch.Tensor

    def routed_tokens(self) -> torch.Tensor:
        """tokens_E of the routed experts alone."""
        return self.tokens_E[-len(self.gate_E) :]


class UseObserver:
    """Gathers `ExpertUse`; `softmax` takes g from all logits instead of the model's weights."""

    def __init__(self, ffn: FeedForward, softmax: bool = False):
        self.ffn, self.softmax = ffn, softmax
        self._tokens = {group.path: [0] * len(group.widths) for group in ffn.groups}
        experts = next(len(group.widths) for group in ffn.groups if group.routed)
        device = next(ffn.module.parameters()).device
        double = torch.float32 if device.type == "mps" else torch.float64
        self._sums_3E = torch.zeros(3, experts, dtype=double, device=device)

    def __call__(self, group, expert: int, x_NH, h_NW, a_N) -> None:
        self._tokens[group.path][expert] += len(x_NH)
        if not group.routed:
            return
        if self.softmax:
            logits_NE = getattr(self.ffn.module, self.ffn.family.router)(x_NH)[0]
            a_N = logits_NE.float().softmax(-1)[:, expert]
        norm_N = group.project(expert, h_NW.to(x_NH.dtype)).float().norm(dim=-1)
        found = torch.stack((a_N.float(), norm_N, a_N.float() * norm_N))
        self._sums_3E[:, expert] += found.to(self._sums_3E.dtype).sum(1)

    def result(self) -> ExpertUse:
        """The statistics gathered so far, on the CPU."""
        tokens = [n for counts in self._tokens.values() for n in counts]
        groups = {group.path: list(group.widths) for group in self.ffn.groups}
        return ExpertUse(groups, torch.tensor(tokens), *self._sums_3E.cpu().double())


@dataclass
class ScoredExperts(ExpertPruning):
    """Removes the lowest-scored experts of every layer; of equals the first goes."""

    calibrates: ClassVar[bool] = True

    def scores(self, seen: ExpertUse) -> torch.Tensor:
        """The score [E] of a layer's routed experts."""
        raise NotImplementedError

    def statistics_key(self) -> dict[str, Any]:
        return {"kind": ExpertUse.kind}

    def observer(self, index: int, ffn: FeedForward) -> UseObserver:
        return UseObserver(ffn)

    def compress(
        self, index: int, ffn: FeedForward, seen: LayerStatistics | None, budget: Budget
    ) -> Outcome:
        score_E, routing = self.scores(seen), routing_of(ffn)
        keep_E = keep_best(score_E, self.dropped(budget), routing.groups)
        return self.drop(ffn, keep_E, score=score_E.tolist())
