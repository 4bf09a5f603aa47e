"""Experts of unequal width, as two tables per layer.

Shapes: T tokens, K experts per token, H hidden, E experts, W kept width of one expert, S = sum of
the kept widths. The table rows of expert e start at 2 * offset[e]: its W gate rows, then its W up
rows, so that one matrix product serves both.
"""

import torch
from torch import nn
from torch.nn import functional as F


class RaggedExperts(nn.Module):
    """Drop-in for any native experts module whose experts kept different numbers of micro-experts.

    y = sum over the top-k experts e of weight_e * down_e(act(gate_e x) * (up_e x)); an expert of
    width 0 keeps its routing slot and adds nothing.

    The parameter names are the native fused names with one dimension less: a reader that doesn't
    know this format meets a shape mismatch and stops, rather than loading random experts.
    """

    def __init__(
        self,
        hidden: int,
        widths: list[int],
        act_fn: nn.Module,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.hidden_dim, self.num_experts = hidden, len(widths)
        self.widths = list(widths)
        self.offsets = [0]
        for width in self.widths:
            self.offsets.append(self.offsets[-1] + width)
        rows = self.offsets[-1]
        self.gate_up_proj = nn.Parameter(torch.empty(2 * rows, hidden, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(hidden, rows, device=device, dtype=dtype))
        self.act_fn = act_fn

    def gate_up(self, expert: int) -> torch.Tensor:
        """Rows of one expert, [2W, H]: gate first, then up."""
        return self.gate_up_proj[2 * self.offsets[expert] : 2 * self.offsets[expert + 1]]

    def down(self, expert: int) -> torch.Tensor:
        """Columns of one expert, [H, W]."""
        return self.down_proj[:, self.offsets[expert] : self.offsets[expert + 1]]

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map x_TH, index_TK, weight_TK to y_TH, one sorted pass over the experts that were hit."""
        top_k = top_k_index.shape[-1]
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).tolist()
        flat_weights = top_k_weights.reshape(-1)
        y_TH = torch.zeros_like(hidden_states)
        start = 0
        for expert, count in enumerate(counts):
            slots = order[start : start + count]
            start += count
            if count == 0 or self.widths[expert] == 0:
                continue
            tokens = slots // top_k
            act = self._apply_gate(F.linear(hidden_states[tokens], self.gate_up(expert)))
            out = F.linear(act, self.down(expert)) * flat_weights[slots, None]
            y_TH.index_add_(0, tokens, out.to(y_TH.dtype))
        return y_TH

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden_dim}, experts={self.num_experts}, "
            f"micro_experts={self.offsets[-1]}, widths={min(self.widths)}..{max(self.widths)}"
        )
