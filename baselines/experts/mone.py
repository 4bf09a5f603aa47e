"""MoNE: experts of stable output and little use are replaced by their mean outputs.

https://arxiv.org/abs/2507.00390

Shapes: E routed experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from baselines.experts.base import ReplacedBy
from baselines.experts.scored import ScoredExperts
from camera.calibration.observers import ObserverSpec

if TYPE_CHECKING:
    from torch import Tensor

    from camera.calibration.experts.outputs import OutputSums
    from camera.moe.budget import Budget

UseOver = Literal["all", "routed"]


@dataclass(frozen=True)
class MoNE(ScoredExperts):
    """Mixture of novices and experts: a removed expert puts out its mean.

    phi_e = ||std_e||_2 * use_e: std_e [H] is the standard deviation of the expert's output over its
    own tokens, use_e the mean of its routing weight. Source: MoNE (ICLR 2026, arXiv 2507.00390),
    equations and code.

    `use_over` all takes that mean over all tokens, 0 where the expert isn't chosen, as the released
    code does; routed over the expert's own tokens, as the paper's formula says. The reference is
    one-shot: that is the framework's propagate=dense.
    """

    name: ClassVar[str] = "mone"

    replaced_by: ReplacedBy = "mean"
    use_over: UseOver = "all"

    def check(self, budget: Budget) -> None:
        self.require_choice("use_over", UseOver)
        super().check(budget)

    def observer(self) -> ObserverSpec:
        from camera.calibration.experts.outputs import OutputSumsSpec

        return OutputSumsSpec()

    def with_outputs(self, ranking: ObserverSpec) -> ObserverSpec:
        return self.outputs()  # which rank too

    def expert_scores(self, seen: OutputSums) -> Tensor:
        """phi, times the number of all tokens where use is over all."""
        tokens_E = seen.routed_tokens.double()
        use_E = seen.gate_E if self.use_over == "all" else seen.gate_E / tokens_E.clamp(min=1)
        excess_EH = seen.square_EH - tokens_E[:, None] * seen.mean_EH.square()
        variance_EH = excess_EH.clamp(min=0) / (tokens_E - 1).clamp(min=1)[:, None]
        return variance_EH.sum(1).sqrt() * use_E
