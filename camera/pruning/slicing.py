"""Removal of micro-experts from all three matrices of an expert.

Shapes: N micro-experts of a layer's pool.
"""

from typing import Any

from camera.checkpoint.formats.format import Format
from camera.checkpoint.formats.narrow import narrow_mlp
from camera.checkpoint.formats.ragged import ragged_of
from camera.moe.experts.group import MlpExpert
from camera.moe.feed_forward import FeedForward
from camera.moe.pool import KeptRows, rows_on
from camera.runtime.errors import CameraError


def slice_layer(ffn: FeedForward, kept: KeptRows) -> dict[str, dict[str, Any]]:
    """Keep only these micro-experts: rows of gate and up, columns of down.

    Native routed experts become `RaggedExperts`; a native dense FFN or shared expert keeps its
    linear layers, narrower. A module in a compressed format selects them itself. Returns the specs
    of all modules that were pruned, by path. CameraError for a format that can't be pruned.
    """
    forms, kept = {}, rows_on(kept, next(ffn.module.parameters()).device)
    for group in ffn.groups:
        rows, module = kept[group.path], group.module
        if isinstance(module, Format):
            try:
                pruned = module.select(rows)
            except NotImplementedError as error:
                raise CameraError(
                    f"{group.path} is packed: prune before you quantise, or export it first."
                ) from error
        elif isinstance(group, MlpExpert):
            forms[group.path] = narrow_mlp(module, rows[0])
            continue
        else:
            pruned = ragged_of(group, rows)
        ffn.replace(group, pruned)
        forms[group.path] = pruned.spec()
    return forms
