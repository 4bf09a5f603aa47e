"""How a native module stores its experts, and views of one expert in the layout of this package.

Shapes: E experts, W width of one expert, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ExpertLayout:
    """The order of a native module's numbers, as transformers' own class tells it.

    Plain: gate_up_proj [E, 2W, H], gate first, and down_proj [E, H, W]. transposed: [E, H, 2W] and
    [E, W, H]. interleaved: gate and up take turns. biased: gate_up_proj_bias [E, 2W] and
    down_proj_bias [E, H] besides.
    """

    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    @classmethod
    def of(cls, module: Any) -> "ExpertLayout":
        """The layout of a native module."""
        concatenated = getattr(module, "is_concatenated", True)
        transposed, biased = (getattr(module, n, False) for n in ("is_transposed", "has_bias"))
        return cls(transposed, not concatenated, biased)

    def width(self, module: Any) -> int:
        """Width of every expert."""
        return module.down_proj.shape[1 if self.transposed else 2]

    def hidden(self, module: Any) -> int:
        """Width of the residual stream."""
        return module.down_proj.shape[2 if self.transposed else 1]

    def halves(self, both: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of gate and up in what a module holds, or computes, of both."""
        if not self.interleaved:
            return both.chunk(2, dim)
        pairs = both.unflatten(dim, (-1, 2))
        return pairs.unbind(dim + 1 if dim >= 0 else dim)

    def fused(self, module: Any, expert: int) -> torch.Tensor:
        """Gate and up of one expert as they are stored, rows first: a view [2W, H]."""
        both = module.gate_up_proj[expert]
        return both.T if self.transposed else both

    def down(self, module: Any, expert: int) -> torch.Tensor:
        """Output weights of one expert: a view [H, W]."""
        weight = module.down_proj[expert]
        return weight.T if self.transposed else weight

    def native(
        self,
        gate_up_E2WH: torch.Tensor,
        down_EHW: torch.Tensor,
        gate_up_bias_E2W: torch.Tensor | None = None,
        down_bias_EH: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Tensors of all experts, by the names and in the layout of the native module."""
        found = {"gate_up_proj": self._in_turns(gate_up_E2WH), "down_proj": down_EHW}
        if self.transposed:
            found = {name: tensor.mT.contiguous() for name, tensor in found.items()}
        if self.biased:
            found["gate_up_proj_bias"] = self._in_turns(gate_up_bias_E2W)
            found["down_proj_bias"] = down_bias_EH
        return found

    def _in_turns(self, both: torch.Tensor) -> torch.Tensor:
        return torch.stack(both.chunk(2, 1), 2).flatten(1, 2) if self.interleaved else both
