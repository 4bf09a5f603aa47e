"""The one slicer: removes micro-experts from all three matrices at once, physically.

Shapes: N micro-experts of a layer's pool, W kept width of one expert, H hidden.
"""

import torch
from torch import nn

from camera.blocks import ExpertGroup, FeedForward, MlpExpert
from camera.experts import RaggedExperts


def slice_layer(ffn: FeedForward, keep_N: torch.Tensor, layer: nn.Module) -> dict[str, list[int]]:
    """Keep the micro-experts where `keep_N` (bool, pool order) is True; the kept widths by path.

    Rows of gate and up and columns of down go together. Routed experts become `RaggedExperts`,
    a dense FFN or shared expert keeps its linear layers, narrower.
    """
    widths: dict[str, list[int]] = {}
    for group, kept in zip(ffn.groups, split_by_group(ffn, keep_N), strict=True):
        widths[group.path] = [len(rows) for rows in kept]
        if isinstance(group, MlpExpert):
            narrow_mlp(group.module, kept[0])
        else:
            parent, name = parent_of(layer, ffn, group)
            setattr(parent, name, _ragged(group, kept))
    return widths


def split_by_group(ffn: FeedForward, keep_N: torch.Tensor) -> list[list[torch.Tensor]]:
    """Indices of the kept micro-experts, per group and expert, sorted."""
    per_expert = [part.nonzero().squeeze(1) for part in keep_N.cpu().split(ffn.widths)]
    groups, start = [], 0
    for group in ffn.groups:
        groups.append(per_expert[start : start + len(group.widths)])
        start += len(group.widths)
    return groups


def parent_of(layer: nn.Module, ffn: FeedForward, group: ExpertGroup) -> tuple[nn.Module, str]:
    """The module that holds a group's module, and the attribute it holds it by."""
    for module in (ffn.module, layer):
        for name, child in module.named_children():
            if child is group.module:
                return module, name
    raise LookupError(f"{group.path} is no child of its layer")


def narrow_mlp(mlp: nn.Module, rows: torch.Tensor) -> None:
    """Keep these rows of gate_proj and up_proj and columns of down_proj."""
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


def resize_note(mlp: nn.Module, width: int) -> None:
    """Keep the width that an MLP remembers of itself true."""
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = width


def _ragged(group: ExpertGroup, kept: list[torch.Tensor]) -> RaggedExperts:
    down = group.down(0)
    widths = [len(rows) for rows in kept]
    experts = RaggedExperts(down.shape[0], widths, group.act_fn, down.device, down.dtype)
    experts.requires_grad_(False)
    for e, rows in enumerate(kept):
        rows = rows.to(down.device)
        gate, up = group.gate_up(e)
        torch.cat((gate[rows], up[rows]), out=experts.gate_up(e))
        experts.down(e).copy_(group.down(e)[:, rows])
    return experts
