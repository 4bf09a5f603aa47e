"""MXFP4 experts of gpt-oss: FP4 codes by blocks of 32, and a power of two for each block.

`X_blocks` uint8 [E, R, G, 16] and `X_scales` uint8 [E, R, G] make `X` [E, C, R], C = 32 G.

Shapes: E experts, R rows (outputs), G blocks of a row, C columns (inputs).
"""

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from camera.checkpoint.places import PackedPlace
from camera.checkpoint.quantized.stored import StoredWeights

BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # of a block
WORKSPACE = 8  # bytes of a weight of one expert, while its codes are looked up
BESIDE = ()


def unpacked(stored: StoredWeights) -> dict[str, PackedPlace]:
    """The plain tensors, by name, that blocks and their scales make."""
    found = {}
    for key, place in stored.places.items():
        if not key.endswith(BLOCKS):
            continue
        name = key.removesuffix(BLOCKS)
        scale = stored.part(key, name + SCALES)
        if place.dtype != torch.uint8 or len(place.shape) != 4 or place.shape[-1] != BYTES:
            stored.refuse(key, place, f"is {place.dtype} {list(place.shape)}, which no blocks are")
        stored.require_shape(name + SCALES, scale, place.shape[:-1])
        if scale.dtype != torch.uint8:
            stored.refuse(name + SCALES, scale, f"is {scale.dtype}, which no scale can be")
        experts, rows, groups, _ = place.shape
        columns = 2 * BYTES * groups
        found[name] = PackedPlace(
            {"blocks": place, "scales": scale},
            lambda parts: dequantized(parts["blocks"], parts["scales"], stored.dtype),
            stored.dtype,
            (experts, columns, rows),
            workspace=WORKSPACE * rows * columns,
            stacked=True,
        )
    return found


def dequantized(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[E, C, R] of blocks [E, R, G, 16], an expert at a time."""
    experts, rows, groups, _ = blocks.shape
    shape = (experts, 2 * BYTES * groups, rows)
    plain = torch.empty(shape, dtype=dtype, device=blocks.device)
    for expert in range(experts):
        one = slice(expert, expert + 1)
        plain[one] = convert_moe_packed_tensors(blocks[one], scales[one], dtype=dtype)
    return plain
