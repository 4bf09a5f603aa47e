"""A shared expert or dense FFN of fewer micro-experts: its native class, narrower."""

import torch
from torch import nn

from camera.checkpoint.formats.format import Format, Spec
from camera.moe.families.family import Family

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class NarrowMlp(Format):
    """The native MLP with fewer rows in gate and up and fewer columns in down.

    Its modules are instances of the native class, not of this one.
    """

    name = "narrow"

    @classmethod
    def from_spec(cls, native: nn.Module, spec: Spec) -> nn.Module:
        width = spec["width"]
        for name in PROJECTIONS:
            old = getattr(native, name)
            ends = (width, old.out_features) if name == "down_proj" else (old.in_features, width)
            new = nn.Linear(*ends, bias=old.bias is not None, device="meta", dtype=old.weight.dtype)
            setattr(native, name, new)
        set_intermediate_size(native, width)
        return native

    @classmethod
    def width_key(cls, family: Family, path: str) -> str:
        keys = family.keys
        return keys.shared_width if family.is_shared(path) else keys.dense_width

    @classmethod
    def widest(cls, spec: Spec) -> int:
        return spec["width"]


def narrow_mlp(mlp: nn.Module, rows: torch.Tensor) -> Spec:
    """Keep these rows of gate_proj and up_proj and columns of down_proj, in place; the spec."""
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
    set_intermediate_size(mlp, len(rows))
    return narrow_spec(mlp)


def narrow_spec(mlp: nn.Module) -> Spec:
    """The spec of a native MLP of any width."""
    return {"form": NarrowMlp.name, "width": mlp.up_proj.out_features}


def padded_mlp(mlp: nn.Module, width: int) -> dict[str, torch.Tensor]:
    """Tensors of an MLP with zero rows (gate, up) and columns (down) up to `width`."""
    padded = {}
    for name in ("gate_proj", "up_proj"):
        for part, tensor in getattr(mlp, name).state_dict().items():
            shape = (width, *tensor.shape[1:])
            padded[f"{name}.{part}"] = tensor.new_zeros(shape)
            padded[f"{name}.{part}"][: len(tensor)] = tensor
    weight = mlp.down_proj.weight.detach()
    padded["down_proj.weight"] = weight.new_zeros(len(weight), width)
    padded["down_proj.weight"][:, : weight.shape[1]] = weight
    return padded


def set_intermediate_size(mlp: nn.Module, width: int) -> None:
    """Update `intermediate_size`, where an MLP has it."""
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = width
