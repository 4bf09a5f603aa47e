"""FP8 weights with a scale for each block: DeepSeek-V3, Qwen3-FP8, GLM-FP8, MiniMax-M2.

`X` float8 [..., R, C] and `X_scale_inv` [..., R / r, C / c] (rounded up), by which blocks of r x c
are multiplied; without blocks, one scale a matrix. Scales are floating-point numbers, or bytes that
are powers of two (UE8M0).

Shapes: R rows (outputs), C columns (inputs).
"""

from math import prod

import torch

from camera.checkpoint.places import PackedPlace
from camera.checkpoint.quantized.stored import StoredWeights

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
STEP = 2**22  # numbers that are in fp32 at a time
BLOCK = (128, 128)  # where config.json doesn't say
BESIDE = ("activation_scale", "input_scale")  # of activations, which stay as they are


def unpacked(stored: StoredWeights) -> dict[str, PackedPlace]:
    """The plain tensors, by name, that float8 ones and their scales make."""
    block, found = _block(stored), {}
    for key, place in stored.places.items():
        if place.dtype not in FLOAT8:
            continue
        name = next((n for n in (f"{key}_scale_inv", f"{key}_scale") if n in stored.places), None)
        scale = stored.part(key, name or f"{key}_scale_inv")
        if len(place.shape) < 2:
            stored.refuse(key, place, f"is FP8 and has the shape {list(place.shape)}")
        *stack, rows, columns = place.shape
        if block is None and scale.shape in ((), (1,)):
            grid = scale.shape
        elif block is None:
            grid = (*stack, 1, 1) if len(scale.shape) > len(stack) else (*stack,)
        else:
            grid = (*stack, -(-rows // block[0]), -(-columns // block[1]))
        stored.require_shape(name or key, scale, tuple(grid))
        if not scale.dtype.is_floating_point and scale.dtype != torch.uint8:
            stored.refuse(name or key, scale, f"is {scale.dtype}, which no scale can be")
        size = block or (rows, columns)
        found[key] = PackedPlace(
            {"codes": place, "scales": scale},
            lambda parts, size=size: dequantized(**parts, block=size, dtype=stored.dtype),
            stored.dtype,
            place.shape,
            workspace=8 * min(rows * columns, max(STEP, size[0] * columns))
            + 4 * columns * prod(grid[:-1]),
            stacked=bool(stack) and scale.shape[:1] == place.shape[:1],
        )
    return found


def dequantized(
    codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """codes [..., R, C] times the scale of each block, in fp32, rounded once to `dtype`."""
    rows, columns = codes.shape[-2:]
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    plain = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    matrices = prod(codes.shape[:-2])
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    scales = scales.float().expand(matrices) if scales.numel() == 1 else scales.float()
    codes_MRC, plain_MRC = codes.view(-1, rows, columns), plain.view(-1, rows, columns)
    scales_MGC = scales.reshape(matrices, *grid).repeat_interleave(block[1], 2)[..., :columns]
    blocks = max(1, STEP // (block[0] * columns))
    for matrix in range(matrices):
        for first in range(0, grid[0], blocks):
            part = slice(first * block[0], (first + blocks) * block[0])
            codes_RC = codes_MRC[matrix, part].float()
            scales_RC = scales_MGC[matrix, first : first + blocks].repeat_interleave(block[0], 0)
            plain_MRC[matrix, part] = codes_RC.mul_(scales_RC[: len(codes_RC)])
    return plain


def _block(stored: StoredWeights) -> tuple[int, int] | None:
    if stored.told.get("expert_dtype", "fp8") != "fp8":
        stored.refuse_setting("expert_dtype", "fp8")
    block = stored.told.get("weight_block_size", BLOCK)
    if block is None:
        return None
    sides = block if isinstance(block, list | tuple) else ()
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        stored.refuse_setting("weight_block_size", "two whole numbers or null")
    return sides[0], sides[1]
