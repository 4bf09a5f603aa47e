"""A shared expert or dense FFN that kept some of its micro-experts: its own class, narrower."""

from typing import Any

import torch
from torch import nn

from camera.checkpoint.formats.format import Form

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class NarrowMlp(Form):
    """The native MLP with fewer rows in gate and up and fewer columns in down."""

    form = "narrow"

    @classmethod
    def build(cls, native: nn.Module, spec: dict[str, Any]) -> nn.Module:
        width = spec["width"]
        for name in PROJECTIONS:
            old = getattr(native, name)
            ends = (width, old.out_features) if name == "down_proj" else (old.in_features, width)
            new = nn.Linear(*ends, bias=old.bias is not None, device="meta", dtype=old.weight.dtype)
            setattr(native, name, new)
        resize_note(native, width)
        return native


def narrow_mlp(mlp: nn.Module, rows: torch.Tensor) -> dict[str, Any]:
    """Keep these rows of gate_proj and up_proj and columns of down_proj; returns the spec."""
    for name in ("gate_proj", "up_proj"):
        linear = getattr(mlp, name)
        rows = rows.to(linear.weight.device)
        linear.weight = nn.Parameter(linear.weight.data[rows].contiguous(), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.data[rows].contiguous(), requires_grad=False)
        linear.out_features = len(rows)
    down = mlp.down_proj
    down.weight = nn.Parameter(down.weight.data[:, rows].contiguous(), requires_grad=False)
    down.in_features = len(rows)
    resize_note(mlp, len(rows))
    return {"form": NarrowMlp.form, "width": len(rows)}


def resize_note(mlp: nn.Module, width: int) -> None:
    """Keep the width that an MLP remembers of itself true."""
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = width
