"""A bit plan for one expert: the bits of its three matrices, and the order that they imply.

Shapes: W width of one expert, M micro-experts of it that stay, H hidden.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExpertBits:
    """The bits of one expert's three matrices.

    down [W]: by column, i.e. micro-expert; 0 removes it. gate, up: by row [W] (`axis` rows) or by
    input channel [H] (columns). priority [W]: of micro-experts of equal bits the highest comes
    first; None leaves them in order.
    """

    axis: str
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    priority: torch.Tensor | None = None

    @classmethod
    def matched(cls, bits_W: torch.Tensor, priority_W: torch.Tensor | None = None) -> "ExpertBits":
        """The same bits in gate, up and down of a micro-expert."""
        return cls("rows", bits_W, bits_W, bits_W, priority_W)

    def order(self) -> torch.Tensor:
        """The micro-experts that stay, by falling bits of down: int64 [M]."""
        first = torch.arange(len(self.down))
        if self.priority is not None:
            first = torch.argsort(self.priority, descending=True, stable=True)
        order = first[falling(self.down[first])]
        return order[self.down[order] > 0]

    def folded(self) -> "ExpertBits":
        """The same after the micro-experts were put in that order."""
        order = self.order()
        rows = order if self.axis == "rows" else slice(None)
        return ExpertBits(self.axis, self.gate[rows], self.up[rows], self.down[order])


def falling(bits: torch.Tensor) -> torch.Tensor:
    """The order that makes bits descend and moves nothing else."""
    return torch.argsort(bits, descending=True, stable=True)
