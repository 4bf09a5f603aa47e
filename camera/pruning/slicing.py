"""The one slicer: removes micro-experts from all three matrices at once, physically.

Shapes: N micro-experts of a layer's pool.
"""

from typing import Any

import torch

from camera.checkpoint.formats.format import Form
from camera.checkpoint.formats.narrow import narrow_mlp
from camera.checkpoint.formats.ragged import RaggedExperts
from camera.moe.feed_forward import ExpertGroup, FeedForward, MlpExpert
from camera.moe.pool import KeptRows
from camera.runtime.errors import CameraError


def slice_layer(ffn: FeedForward, kept: KeptRows) -> dict[str, dict[str, Any]]:
    """Keep only these micro-experts: rows of gate and up and columns of down go together.

    Routed experts become `RaggedExperts`; a dense FFN or shared expert keeps its linear layers,
    narrower. Returns the form of every module that was cut, by path.
    """
    forms = {}
    for group in ffn.groups:
        rows = kept[group.path]
        if isinstance(group, MlpExpert):
            if isinstance(group.module, Form):
                raise CameraError(
                    f"{group.path} is packed: prune before you quantise, or export it first."
                )
            forms[group.path] = narrow_mlp(group.module, rows[0])
        else:
            experts = _ragged(group, rows)
            ffn.replace(group, experts)
            forms[group.path] = experts.spec()
    return forms


def _ragged(group: ExpertGroup, kept: list[torch.Tensor]) -> RaggedExperts:
    down = group.down(0)
    widths = [len(rows) for rows in kept]
    experts = RaggedExperts(down.shape[0], widths, group.act_fn, down.device, down.dtype)
    experts.requires_grad_(False)
    for e, rows in enumerate(kept):
        rows = rows.to(down.device)
        for whole, part in zip(group.gate_up(e), experts.gate_up(e).chunk(2), strict=True):
            torch.index_select(whole, 0, rows, out=part)
        # written row by row: a copy into the transposed view would take several times as long
        experts.down(e).t().copy_(group.down(e).index_select(1, rows).t())
    return experts
