"""Frequency: removes the experts selected by the fewest tokens.

Shapes: E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from baselines.experts.scored import ScoredExperts
from baselines.experts.use import ExpertUse

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Frequency(ScoredExperts):
    """Removes the least-used experts: the score is the number of tokens routed to the expert.

    Counted on the dense model with propagate=dense, on the output of the pruned layers before with
    propagate=compressed, the framework's default for all methods.
    """

    name: ClassVar[str] = "frequency"

    def expert_scores(self, seen: ExpertUse) -> Tensor:
        return seen.routed_tokens().double()
