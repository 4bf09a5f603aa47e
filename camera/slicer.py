"""The one slicer: removes micro-experts from all three matrices at once, physically.

Shapes: N micro-experts of a layer's pool.
"""

import torch
from torch import nn

from camera.blocks import ExpertGroup, FeedForward, MlpExpert
from camera.experts import RaggedExperts

Kept = dict[str, list[torch.Tensor]]
"""By module path and expert: the sorted rows of the micro-experts that stay."""


def kept_rows(ffn: FeedForward, keep_N: torch.Tensor) -> Kept:
    """A plan (bool, pool order) as row indices per expert."""
    rows = iter(part.nonzero().squeeze(1) for part in keep_N.cpu().split(ffn.widths))
    return {group.path: [next(rows) for _ in group.widths] for group in ffn.groups}


def slice_layer(ffn: FeedForward, kept: Kept) -> None:
    """Keep only these micro-experts: rows of gate and up and columns of down go together.

    Routed experts become `RaggedExperts`; a dense FFN or shared expert keeps its linear layers,
    narrower.
    """
    for group in ffn.groups:
        if isinstance(group, MlpExpert):
            narrow_mlp(group.module, kept[group.path][0])
        else:
            setattr(ffn.module, ffn.family.experts, _ragged(group, kept[group.path]))


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
