"""Methods that remove whole routed experts, and what they put in the place of these.

Without constants the result is a plain checkpoint of the model's own type with fewer experts in
every layer. Shapes: E routed experts of a layer, R removed, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any, Literal, get_args

from camera.calibration.observers import ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.method import Applied, LayerPlan, Method, Pass, PassKind, Plan, Propagate
from camera.moe.budget import Sparsity, SparsityOf
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from torch import Tensor

    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward
    from camera.moe.routing import RouterConstraints
    from camera.pruning.plan import KeptExperts, ReplacedExperts

ReplacedBy = Literal["none", "mean", "fitted"]


@dataclass(frozen=True)
class ExpertPruning(Method):
    """Removes r whole routed experts of every layer.

    r is the largest number that doesn't exceed `sparsity` of `sparsity_of`: experts are whole, so
    what is realised is at most that, and less by less than one expert (of each group) per layer.
    Shared experts stay, and with `spare_super_experts` those that were found
    (`camera.calibration.experts.super_experts`).

    `replaced_by` none removes the router rows of the experts too (of `model` they count), so that
    tokens choose others; r is then a multiple of a group-limited router's groups. mean and fitted
    leave the router as it is: a token that chooses a removed expert gets a constant, times its
    routing weight. mean is the expert's mean output (MoNE); fitted is the least-squares fit of
    `camera.compensation.constants`, of all removed experts of a layer together.
    """

    sparsity: float
    sparsity_of: SparsityOf = "moe"
    spare_super_experts: bool = True
    replaced_by: ReplacedBy = "none"

    @property
    def native(self) -> bool:
        return self.replaced_by == "none"

    @property
    def plan_kind(self) -> str:
        return "experts" if self.native else "replaced_experts"

    @property
    def reads_text(self) -> bool:
        return True

    def check(self, budget: Budget) -> None:
        self.require_constants(budget)
        self.removed(budget)

    def require_constants(self, budget: Budget) -> None:
        """CameraError where `replaced_by` is no choice, or constants can't be weighted."""
        from camera.moe.families import family_of

        self.require_choice("replaced_by", ReplacedBy)
        if not self.native and family_of(budget.model_type).weighs_inputs:
            raise CameraError(
                f"replaced_by={self.replaced_by} puts a constant times its routing weight in the "
                f"place of an expert, and a model of type {budget.model_type} scales what experts "
                "read by that weight: set method.replaced_by=none."
            )

    def require_choice(self, key: str, choices: Any) -> None:
        """CameraError for a setting that is none of its choices."""
        value, known = getattr(self, key), get_args(choices)
        if value not in known:
            raise CameraError(f"{key}={value} is none of {', '.join(known)}.")

    def removed(self, budget: Budget) -> int:
        """r of every layer; CameraError, naming the nearest possible sparsity, if there is none."""
        routing = self.routing(budget)
        step, most = self.steps(routing)
        share = step * len(budget.layers) * self.share_of_one(budget)
        steps, most = floor(self.sparsity / share + 1e-9), most // step
        if 1 <= steps <= most:
            return steps * step
        if not most:
            raise CameraError(
                f"method {self.name}: a layer of this {budget.model_type} model has "
                f"{routing.experts} routed experts, none of which its top-{routing.top_k} router "
                "can spare."
            )
        end, number = ("smallest", 1) if steps < 1 else ("largest", most)
        groups = f" from {step} groups of equal size" if step > 1 else ""
        raise CameraError(
            f"sparsity={self.sparsity} of '{self.sparsity_of}' can't be met by removing whole "
            f"experts: the {end} possible for method {self.name} is "
            f"{ceil(number * share * 1e4) / 1e4} ({number * step} of {routing.experts} "
            f"experts per layer; the router chooses {routing.top_k}{groups})."
        )

    def share_left(self, budget: Budget) -> float:
        routed = budget.dense.routed / budget.dense.moe
        return 1 - routed * self.removed(budget) / self.routing(budget).experts

    def steps(self, routing: RouterConstraints) -> tuple[int, int]:
        """What the number of removed experts of a layer is a multiple of, and the largest one."""
        if self.native:
            return routing.groups, routing.most
        return 1, routing.experts - 1

    def share_of_one(self, budget: Budget) -> float:
        """The share of `sparsity_of` that goes with one expert of one layer."""
        routing, layers = self.routing(budget), len(budget.layers)
        one = budget.dense.routed / (routing.experts * layers)
        if not self.native:
            one -= budget.hidden  # its constant stays
        elif self.sparsity_of == "model":
            one += routing.row
        return one / Sparsity(self.sparsity, self.sparsity_of).whole(budget)

    def spared(self, index: int, budget: Budget) -> list[int]:
        """The super experts of a layer that are to stay, by their number among the routed ones."""
        pool = budget.layers[index]
        shared = pool.routed.index(True)
        found = [expert - shared for expert in pool.super_experts if expert >= shared]
        return found if self.spare_super_experts else []

    def require_spared(self, index: int, keep_E: Tensor, budget: Budget) -> None:
        """CameraError where a super expert would have to go."""
        if gone := [expert for expert in self.spared(index, budget) if not keep_E[expert]]:
            told = ", ".join(map(str, gone))
            raise CameraError(
                f"sparsity={self.sparsity} leaves no room in layer {index} for its super experts "
                f"(expert {told}): use a smaller sparsity, or method.spare_super_experts=false."
            )

    def routing(self, budget: Budget) -> RouterConstraints:
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

    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        spec = self.observer()
        if not self.native:
            return (Pass(PassKind.COMPRESSED, self.with_outputs(spec), feed=propagate),)
        if spec.reads == "weights":
            return (Pass(PassKind.COMPRESSED, spec, tokens=False),)
        if propagate == "dense":
            return (Pass(PassKind.DENSE, spec), Pass(PassKind.COMPRESSED, tokens=False))
        return (Pass(PassKind.COMPRESSED, spec),)

    def observer(self) -> ObserverSpec:
        """What ranks the experts of a layer."""
        raise NotImplementedError

    def outputs(self) -> ObserverSpec:
        """What constants are made from."""
        from camera.calibration.experts.outputs import OutputSumsSpec

        return OutputSumsSpec(joint=self.replaced_by == "fitted")

    def with_outputs(self, ranking: ObserverSpec) -> ObserverSpec:
        """What ranks the experts of a layer, and beside it what constants are made from."""
        from camera.calibration.experts.outputs import RankedOutputsSpec

        return RankedOutputsSpec(ranking, self.outputs())

    def decided(
        self, keep_E: Tensor, seen: LayerStatistics, report: dict[str, Any]
    ) -> KeptExperts | ReplacedExperts:
        """The plan of a layer of which these experts stay."""
        from camera.pruning.plan import KeptExperts, ReplacedExperts

        if self.native:
            return KeptExperts(keep_E, report)
        from camera.calibration.experts.outputs import RankedOutputs
        from camera.compensation.constants import fitted_constants

        outputs = seen.outputs if isinstance(seen, RankedOutputs) else seen
        removed = (~keep_E).nonzero().flatten().tolist()
        if self.replaced_by == "fitted":
            sums = (outputs.mean_EH, outputs.gram_SEE, outputs.joint_SEEH)
            constants_RH, ridge = fitted_constants(removed, *sums)
            report = report | {"ridge": ridge}
        else:
            constants_RH = outputs.mean_EH[removed]
        return ReplacedExperts(keep_E, constants_RH.float(), report)

    def apply(
        self, index: int, ffn: FeedForward, plan: LayerPlan, seen: LayerStatistics | None
    ) -> Applied:
        from camera.pruning.whole_experts import remove_experts, replace_experts

        modules = {}
        if self.native:
            remove_experts(ffn, plan.keep_E.nonzero().flatten().tolist())
        else:
            modules = replace_experts(ffn, plan.keep_E.tolist(), plan.constants_RH)
        return Applied(modules, report={"dropped": plan.removed, **plan.report})

    def native_config(self, config: Any, budget: Budget, plan: Plan) -> dict[str, Any]:
        from camera.pruning.whole_experts import smaller_config

        experts = self.routing(budget).experts
        return smaller_config(config, experts - self.removed(budget))
