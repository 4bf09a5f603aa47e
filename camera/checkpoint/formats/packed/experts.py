"""Routed experts of a layer, packed to a few bits per weight.

Shapes: T tokens, K experts per token, N tokens of one expert, H hidden, W width of one expert.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from camera.checkpoint.formats.biases import ExpertBiases
from camera.checkpoint.formats.format import Spec
from camera.checkpoint.formats.packed.base import PackedBuffers
from camera.checkpoint.formats.packed.layout import PackedLayout
from camera.checkpoint.formats.packed.segments import QuantizedMatrix
from camera.checkpoint.formats.packed.spec import segments_of
from camera.checkpoint.formats.ragged import SLOW_HALF, RaggedExperts, ragged_of
from camera.moe.experts.activation import Activation, gated
from camera.moe.experts.layout import ExpertLayout
from camera.moe.families.family import Family


class PackedExperts(ExpertBiases, nn.Module, PackedBuffers):
    """Drop-in for any native experts module; an expert is dequantised whenever tokens reach it.

    y = sum over the top-k experts e of weight_e * down_e(act(gate_e x) * (up_e x)); an expert of
    width 0 keeps its routing slot and adds nothing.

    spec: `experts_spec`. The codes have the native fused names: a reader that doesn't know this
    format stops at a shape mismatch and never loads random experts.
    """

    name = "packed"

    def __init__(
        self,
        spec: Spec,
        act_fn: Activation,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layout: ExpertLayout = ExpertLayout(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        self.hidden_dim, self.widths = spec["hidden"], list(spec["widths"])
        self.num_experts, self.act_fn, self.layout = len(self.widths), act_fn, layout
        self._register(spec, device, dtype)
        sizes = 2 * sum(self.widths), self.num_experts, self.hidden_dim
        self._register_biases(sizes if layout.biased else None, device, dtype)

    @classmethod
    def from_spec(cls, native: nn.Module, spec: Spec) -> "PackedExperts":
        dtype, layout = native.down_proj.dtype, ExpertLayout.of(native)
        return cls(spec, native.act_fn, "meta", dtype, layout)

    @classmethod
    def layouts(cls, spec: Spec) -> dict[str, PackedLayout]:
        gate_up, down = segments_of(spec)
        hidden, widths = spec["hidden"], spec["widths"]
        rows, columns = [(width, hidden) for width in widths], [(hidden, width) for width in widths]
        common = spec["group_size"], spec["sym"]
        return {
            "gate_up_proj": PackedLayout(rows, gate_up, *common, parts=2),
            "down_proj": PackedLayout(columns, down, *common),
        }

    @classmethod
    def width_key(cls, family: Family, path: str) -> str:
        return family.keys.width

    @classmethod
    def widest(cls, spec: Spec) -> int:
        return max(spec["widths"])

    def store(self, expert: int, gate_up: Sequence[QuantizedMatrix], down: QuantizedMatrix) -> None:
        """Store a quantised expert: [gate, up], or [both] stacked by rows."""
        self._store("gate_up_proj", expert, *gate_up)
        self._store("down_proj", expert, down)

    def gate_up(self, expert: int) -> torch.Tensor:
        """Dequantised rows of one expert, [2W, H]: gate first, then up."""
        return self._weight("gate_up_proj", expert)

    def down(self, expert: int) -> torch.Tensor:
        """Dequantised columns of one expert, [H, W]."""
        return self._weight("down_proj", expert)

    def gate_up_bias(self, expert: int) -> torch.Tensor | None:
        """Biases of these rows, [2W]; None where there are none."""
        if self.gate_up_proj_bias is None:
            return None
        start = sum(self.widths[:expert])
        return self.gate_up_proj_bias[2 * start : 2 * (start + self.widths[expert])]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map x_TH, index_TK, weight_TK to y_TH, one sorted pass over the experts that were hit."""
        slot_expert = top_k_index.reshape(-1)
        order = slot_expert.argsort(stable=True)
        counts = torch.bincount(slot_expert, minlength=self.num_experts).tolist()
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        weight_S = top_k_weights.reshape(-1).to(wide)
        y_TH = torch.zeros_like(hidden_states, dtype=wide)
        for expert, slots in enumerate(order.split(counts)):
            if not len(slots) or not self.widths[expert]:
                continue
            tokens = slots // top_k_index.shape[-1]
            both_N2W = _linear(hidden_states[tokens], self.gate_up(expert))
            bias_2W = self.gate_up_bias(expert)
            if bias_2W is not None:
                both_N2W = both_N2W + bias_2W
            h_NW = gated(self.act_fn, *both_N2W.chunk(2, dim=-1))
            out_NH = _linear(h_NW, self.down(expert)).to(wide)
            y_TH.index_add_(0, tokens, out_NH * weight_S[slots, None])
        y_TH = self._with_biases(y_TH, top_k_index, top_k_weights)
        return y_TH.to(hidden_states.dtype)

    def dequantize(self, native: nn.Module | None = None) -> RaggedExperts:
        """The same experts with plain weights, in this module's dtype."""
        return ragged_of(self)

    def select(self, rows: Sequence[torch.Tensor]) -> RaggedExperts:
        """Plain weights of these micro-experts."""
        return ragged_of(self, rows)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden_dim}, experts={self.num_experts}, rows={sum(self.widths)}"


def _linear(x_NC: torch.Tensor, W_RC: torch.Tensor) -> torch.Tensor:
    """x W^T in the precision of x; where a CPU is slow at that, in fp32 and rounded once."""
    if SLOW_HALF and x_NC.device.type == "cpu" and x_NC.element_size() < 4:
        return F.linear(x_NC.float(), W_RC.float()).to(x_NC.dtype)
    return F.linear(x_NC, W_RC)
