"""One expert's weights in the order in which a bit plan stores its micro-experts.

Shapes: H hidden, W width of the expert, M micro-experts of it that stay, N tokens.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from camera.checkpoint.formats.narrow import PROJECTIONS
from camera.moe.experts.activation import gated
from camera.moe.experts.group import ExpertGroup
from camera.quantization.plans.layer_bits import ExpertBits


@dataclass(frozen=True)
class OrderedExpert:
    """One expert's weights, with micro-experts in their stored order."""

    group: ExpertGroup
    number: int
    order_M: torch.Tensor
    bits: ExpertBits

    def gate_up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up [M, H]."""
        gate, up = self.group.gate_up(self.number)
        rows = self.order_M.to(gate.device)
        return gate[rows], up[rows]

    def down(self) -> torch.Tensor:
        """[H, M]."""
        weight = self.group.down(self.number)
        return weight[:, self.order_M.to(weight.device)]

    def hidden(self, H_WW: torch.Tensor) -> torch.Tensor:
        """The Hessian of down's inputs, [M, M]."""
        rows = self.order_M.to(H_WW.device)
        return H_WW[rows][:, rows]

    def activations(
        self, x_NH: torch.Tensor, gate_MH: torch.Tensor, up_MH: torch.Tensor
    ) -> torch.Tensor:
        """h_NM of these weights, fp32."""
        products = [F.linear(x_NH, weight) for weight in (gate_MH, up_MH)]
        bias_2M = self.gate_up_bias()
        if bias_2M is not None:
            products = [p + b for p, b in zip(products, bias_2M.float().view(2, -1), strict=True)]
        return gated(self.group.act_fn, *products)

    def gate_up_bias(self) -> torch.Tensor | None:
        """Biases of gate and up, [2M]; None where there are none."""
        bias_2W = self.group.gate_up_bias(self.number)
        if bias_2W is None:
            return None
        return bias_2W.view(2, -1)[:, self.order_M.to(bias_2W.device)].flatten()

    def biases(self) -> dict[str, torch.Tensor | None]:
        """Biases of the three projections."""
        both = self.gate_up_bias()
        gate, up = (None, None) if both is None else both.chunk(2)
        found = gate, up, self.group.down_bias(self.number)
        return dict(zip(PROJECTIONS, found, strict=True))
