"""A shared expert or dense FFN, packed to a few bits per weight.

Shapes: N tokens, H hidden, W width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from camera.checkpoint.formats.format import Spec
from camera.checkpoint.formats.narrow import PROJECTIONS, NarrowMlp, set_intermediate_size
from camera.checkpoint.formats.packed.base import PackedFormat
from camera.checkpoint.formats.packed.layout import PackedLayout
from camera.checkpoint.formats.packed.linear import PackedLinear
from camera.checkpoint.formats.packed.segments import QuantizedMatrix
from camera.checkpoint.formats.packed.spec import projections
from camera.moe.experts.activation import Activation, gated
from camera.moe.families.family import Family


class PackedMlp(nn.Module, PackedFormat):
    """y = down(act(gate x) * up x), of three packed linear layers. spec: `mlp_spec`.

    biases: by the name of the projection; None or absent: no bias.
    """

    name = "packed_mlp"

    def __init__(
        self,
        spec: Spec,
        act_fn: Activation,
        biases: Mapping[str, torch.Tensor | None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._spec, self.widths, self.act_fn = spec, spec["widths"], act_fn
        for name, linear in projections(spec).items():
            self.add_module(name, PackedLinear(linear, (biases or {}).get(name), device, dtype))

    @classmethod
    def from_spec(cls, native: nn.Module, spec: Spec) -> "PackedMlp":
        width, biases = spec["widths"][0], {}
        for name in PROJECTIONS:
            bias = getattr(native, name).bias
            if bias is not None:  # of the pruned width
                biases[name] = bias.detach() if name == "down_proj" else bias.new_empty(width)
        return cls(spec, native.act_fn, biases, "meta", native.down_proj.weight.dtype)

    @classmethod
    def layouts(cls, spec: Spec) -> dict[str, PackedLayout]:
        return {
            f"{name}.{codes}": layout
            for name, linear in projections(spec).items()
            for codes, layout in PackedLinear.layouts(linear).items()
        }

    @classmethod
    def width_key(cls, family: Family, path: str) -> str:
        return NarrowMlp.width_key(family, path)

    @classmethod
    def widest(cls, spec: Spec) -> int:
        return spec["widths"][0]

    def store(self, gate_up: Sequence[QuantizedMatrix], down: QuantizedMatrix) -> None:
        """Store the quantised matrices: [gate, up], or [both] stacked by rows."""
        gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2)
        self.gate_proj.store(gate)
        self.up_proj.store(up)
        self.down_proj.store(down)

    def gate_up(self, expert: int = 0) -> torch.Tensor:
        """Dequantised rows, [2W, H]: gate first, then up."""
        return torch.cat((self.gate_proj.dense(), self.up_proj.dense()))

    def down(self, expert: int = 0) -> torch.Tensor:
        """Dequantised columns, [H, W]."""
        return self.down_proj.dense()

    def forward(self, x_NH: torch.Tensor) -> torch.Tensor:
        """Map x_NH to y_NH."""
        h_NW = gated(self.act_fn, self.gate_proj(x_NH), self.up_proj(x_NH))
        return self.down_proj(h_NW)

    def dequantize(self, native: nn.Module) -> nn.Module:
        """A native MLP, of any width and on meta, with these weights as plain ones, in place."""
        for name in PROJECTIONS:
            setattr(native, name, getattr(self, name).dequantize())
        set_intermediate_size(native, self.widths[0])
        return native
