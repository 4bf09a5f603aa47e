"""Biases of experts in a format, where the native module has them.

Shapes: R rows of gate and up of all experts, E experts, T tokens, K experts per token, H hidden.
"""

import torch
from torch import nn


class ExpertBiases:
    """Mixin of a module of experts: gate_up_proj_bias [R], in the order of its rows of gate and up,
    and down_proj_bias [E, H]; both None where there are none."""

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def _register_biases(
        self,
        sizes: tuple[int, int, int] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Empty biases of these R, E and H; None: none."""

        def made(*shape: int) -> nn.Parameter | None:
            if sizes is None:
                return None
            empty = torch.empty(shape, device=device, dtype=dtype)
            return nn.Parameter(empty, requires_grad=False)

        rows, experts, hidden = sizes or (0, 0, 0)
        self.register_parameter("gate_up_proj_bias", made(rows))
        self.register_parameter("down_proj_bias", made(experts, hidden))

    def down_bias(self, expert: int) -> torch.Tensor | None:
        """What one expert adds to its output, [H]; None where it has no bias."""
        return None if self.down_proj_bias is None else self.down_proj_bias[expert]

    def _with_biases(
        self, y_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """y_TH and what the biases of each token's experts add to it."""
        if self.down_proj_bias is None:
            return y_TH
        wide = torch.promote_types(y_TH.dtype, torch.float32)
        bias_TKH = self.down_proj_bias[index_TK].to(wide) * weight_TK.to(wide)[..., None]
        return (y_TH + bias_TKH.sum(1)).to(y_TH.dtype)
