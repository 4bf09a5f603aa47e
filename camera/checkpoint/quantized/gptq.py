"""GPTQ weights as AutoGPTQ, GPTQModel and optimum write them.

`X.qweight` int32 [C bits / 32, R], `X.qzeros` int32 [G, R bits / 32], `X.scales` [G, R] and
`X.g_idx` [C] make `X.weight` [R, C] = scale * (code - zero). Zeros are stored less 1, but by the
format gptq_v2.

Shapes: R rows (outputs), C columns (inputs), G groups of columns.
"""

import torch

from camera.checkpoint.places import PackedPlace
from camera.checkpoint.quantized.integers import matrices_of_codes, unpack_columns
from camera.checkpoint.quantized.stored import StoredWeights

BITS = (2, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is missing from stored zeros
WORKSPACE = 16  # bytes of a weight while it is unpacked
BESIDE = ()


def unpacked(stored: StoredWeights) -> dict[str, PackedPlace]:
    """The plain tensors, by name, that codes, zeros and scales make."""
    name = stored.told.get("checkpoint_format", stored.told.get("format", "gptq"))
    if name not in FORMATS:
        stored.refuse_setting("checkpoint_format", " and ".join(FORMATS))
    bits = stored.number("bits", BITS)
    size = stored.told.get("group_size", 128)
    if stored.told.get("dynamic"):
        stored.refuse_setting("dynamic", "one scheme for all modules")
    found = {}
    for path, parts in matrices_of_codes(stored):
        place = parts["qweight"]
        columns, rows = place.shape[0] * 32 // bits, place.shape[1]
        groups = 1 if size == -1 else -(-columns // size)
        stored.require_shape(f"{path}.qzeros", parts["qzeros"], (groups, rows * bits // 32))
        stored.require_shape(f"{path}.scales", parts["scales"], (groups, rows))
        if f"{path}.g_idx" in stored.places:
            parts["g_idx"] = stored.part(f"{path}.qweight", f"{path}.g_idx")
            stored.require_shape(f"{path}.g_idx", parts["g_idx"], (columns,))
        elif stored.told.get("desc_act"):
            stored.part(f"{path}.qweight", f"{path}.g_idx")
        found[f"{path}.weight"] = PackedPlace(
            parts,
            lambda parts, size=columns if size == -1 else size: dequantized(
                parts, bits, size, FORMATS[name], stored.dtype
            ),
            stored.dtype,
            (rows, columns),
            workspace=WORKSPACE * rows * columns,
        )
    return found


def dequantized(
    parts: dict[str, torch.Tensor], bits: int, size: int, less: int, dtype: torch.dtype
) -> torch.Tensor:
    """[R, C] of the parts of one matrix, in fp32, rounded once to `dtype`."""
    codes_RC = unpack_columns(parts["qweight"].T, bits)
    zeros_GR = (unpack_columns(parts["qzeros"], bits) + less) & (2**bits - 1)
    group_C = parts.get("g_idx")
    if group_C is None:
        group_C = torch.arange(codes_RC.shape[1], device=codes_RC.device) // size
    scales_RC = parts["scales"].float().T[:, group_C.long()]
    zeros_RC = zeros_GR.float().T[:, group_C.long()]
    return ((codes_RC - zeros_RC) * scales_RC).to(dtype)
