"""Experts as a shared base and low-rank deltas.

Shapes: T tokens, K experts per token, H hidden, E experts, I width of an expert, B width of the
base (B <= I), R rank, N tokens of one expert.

The base covers the first B of the I micro-experts of every expert; the rest is delta only.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from camera.checkpoint.formats.biases import ExpertBiases
from camera.checkpoint.formats.format import Format, Spec
from camera.checkpoint.formats.ragged import RaggedExperts, ragged_of
from camera.moe.experts.activation import Activation, gated
from camera.moe.experts.layout import ExpertLayout
from camera.moe.families.family import Family


class DeltaExperts(ExpertBiases, nn.Module, Format):
    """Drop-in for native experts whose weights are W_e = W_base + A_e B_e.

    y = sum over the top-k experts e of a_e * down_e(act(gate_e x) * (up_e x)). A token's product
    with the base's gate and up is computed once for its K experts, and so is that with its down:
    sum_e a_e down_base(h_e) = down_base(sum_e a_e h_e). Only the factors cost per expert.

    `gate_up_proj` [2B, H] and `down_proj` [H, B] are the base; `*_left` hold A_e and `*_right` B_e,
    of gate and up the gate's first. The base has the native fused names with one dimension less:
    a reader that doesn't know this format stops at a shape mismatch.
    """

    name = "delta"

    def __init__(
        self,
        hidden: int,
        width: int,
        experts: int,
        base_width: int,
        rank: int,
        act_fn: Activation,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layout: ExpertLayout = ExpertLayout(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        self.hidden_dim, self.num_experts = hidden, experts
        self.base_width, self.rank = base_width, rank
        self.widths = [width] * experts

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.gate_up_proj = table(2 * base_width, hidden)
        self.gate_up_left = table(experts, 2 * width, rank)
        self.gate_up_right = table(experts, 2 * rank, hidden)
        self.down_proj = table(hidden, base_width)
        self.down_left = table(experts, hidden, rank)
        self.down_right = table(experts, rank, width)
        self.act_fn, self.layout = act_fn, layout
        biases = (2 * width * experts, experts, hidden) if layout.biased else None
        self._register_biases(biases, device, dtype)

    def spec(self) -> Spec:
        ranks = {"base_width": self.base_width, "rank": self.rank}
        return {"form": self.name, "width": self.widths[0], **ranks}

    @classmethod
    def from_spec(cls, native: nn.Module, spec: Spec) -> "DeltaExperts":
        layout, experts = ExpertLayout.of(native), len(native.down_proj)
        hidden = layout.hidden(native)
        sizes = hidden, spec["width"], experts, spec["base_width"], spec["rank"]
        return cls(*sizes, native.act_fn, "meta", native.down_proj.dtype, layout)

    @classmethod
    def width_key(cls, family: Family, path: str) -> str:
        return family.keys.width

    @classmethod
    def widest(cls, spec: Spec) -> int:
        return spec["width"]

    def dequantize(self, native: nn.Module | None = None) -> RaggedExperts:
        return ragged_of(self)

    def select(self, rows: Sequence[torch.Tensor]) -> RaggedExperts:
        return ragged_of(self, rows)

    def gate_up(self, expert: int) -> torch.Tensor:
        """W_base + A B of one expert's gate and up, [2I, H]: gate first, then up."""
        left, right = self.gate_up_left[expert].chunk(2), self.gate_up_right[expert].chunk(2)
        parts = [a @ b for a, b in zip(left, right, strict=True)]
        for part, base in zip(parts, self.gate_up_proj.chunk(2), strict=True):
            part[: self.base_width] += base
        return torch.cat(parts)

    def down(self, expert: int) -> torch.Tensor:
        """W_base + A B of one expert's down, [H, I]."""
        weight = self.down_left[expert] @ self.down_right[expert]
        weight[:, : self.base_width] += self.down_proj
        return weight

    def gate_up_bias(self, expert: int) -> torch.Tensor | None:
        """Biases of these rows, [2I]; None where there are none."""
        if self.gate_up_proj_bias is None:
            return None
        return self.gate_up_proj_bias.view(self.num_experts, -1)[expert]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map x_TH, index_TK, weight_TK to y_TH: the base, then a sorted pass over the deltas."""
        top_k, width = top_k_index.shape[-1], self.base_width
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).tolist()
        flat_weights = top_k_weights.reshape(-1, 1).to(hidden_states.dtype)
        base_T2B = F.linear(hidden_states, self.gate_up_proj)
        mixed_TB = hidden_states.new_zeros(len(hidden_states), width)
        y_TH = torch.zeros_like(hidden_states)
        for expert, slots in enumerate(order.split(counts)):
            if len(slots) == 0:
                continue
            tokens = slots // top_k
            phi_NI = self._activations(expert, hidden_states[tokens], base_T2B[tokens])
            phi_NI = phi_NI * flat_weights[slots]
            mixed_TB.index_add_(0, tokens, phi_NI[:, :width])
            low_NR = F.linear(phi_NI, self.down_right[expert])
            y_TH.index_add_(0, tokens, F.linear(low_NR, self.down_left[expert]))
        y_TH = y_TH + F.linear(mixed_TB, self.down_proj)
        return self._with_biases(y_TH, top_k_index, top_k_weights)

    def _activations(self, expert: int, x_NH: torch.Tensor, base_N2B: torch.Tensor) -> torch.Tensor:
        """h_NI = act(gate x) * (up x), the base's share of both products given."""
        low_N2R = F.linear(x_NH, self.gate_up_right[expert])
        gate_IR, up_IR = self.gate_up_left[expert].chunk(2)
        gate_NI = F.linear(low_N2R[:, : self.rank], gate_IR)
        up_NI = F.linear(low_N2R[:, self.rank :], up_IR)
        gate_NI[:, : self.base_width] += base_N2B[:, : self.base_width]
        up_NI[:, : self.base_width] += base_N2B[:, self.base_width :]
        bias_2I = self.gate_up_bias(expert)
        if bias_2I is not None:
            gate_I, up_I = bias_2I.chunk(2)
            gate_NI, up_NI = gate_NI + gate_I, up_NI + up_I
        return gated(self.act_fn, gate_NI, up_NI)

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden_dim}, experts={self.num_experts}, width={self.widths[0]}, "
            f"base_width={self.base_width}, rank={self.rank}"
        )
