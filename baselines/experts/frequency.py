"""Frequency: the experts that fewest tokens are routed to go.

Shapes: E routed experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from baselines.experts.base import ExpertUse, ScoredExperts


@dataclass
class Frequency(ScoredExperts):
    """Removes the least-used experts: the score is the number of tokens routed to the expert.

    Counted on the dense model with propagate=dense, on what the pruned layers before put out with
    propagate=compressed, the framework's default for all methods.
    """

    name: ClassVar[str] = "frequency"

    def scores(self, seen: ExpertUse) -> torch.Tensor:
        return seen.routed_tokens().double()
