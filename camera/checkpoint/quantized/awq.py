"""AWQ weights as AutoAWQ writes them (version gemm).

`X.qweight` int32 [C, R / 8], `X.qzeros` int32 [G, R / 8] and `X.scales` [G, R] make `X.weight`
[R, C] = scale * (code - zero); eight rows lie in an int32 in the order 0, 2, 4, 6, 1, 3, 5, 7.

Shapes: R rows (outputs), C columns (inputs), G groups of columns.
"""

import torch

from camera.checkpoint.places import PackedPlace
from camera.checkpoint.quantized.integers import matrices_of_codes, unpack_columns
from camera.checkpoint.quantized.stored import StoredWeights

BITS, CODES = 4, 8  # of an int32
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # of each of eight rows
WORKSPACE = 16  # bytes of a weight while it is unpacked
BESIDE = ()


def unpacked(stored: StoredWeights) -> dict[str, PackedPlace]:
    """The plain tensors, by name, that codes, zeros and scales make."""
    stored.number("bits", (BITS,), BITS)
    if str(stored.told.get("version", "gemm")).lower() != "gemm":
        stored.refuse_setting("version", "gemm")
    size, found = stored.told.get("group_size", 128), {}
    for path, parts in matrices_of_codes(stored):
        place = parts["qweight"]
        columns, rows = place.shape[0], place.shape[1] * CODES
        groups = 1 if size == -1 else -(-columns // size)
        stored.require_shape(f"{path}.qzeros", parts["qzeros"], (groups, rows // CODES))
        stored.require_shape(f"{path}.scales", parts["scales"], (groups, rows))
        found[f"{path}.weight"] = PackedPlace(
            parts,
            lambda parts, size=columns if size == -1 else size: dequantized(
                parts, size, stored.dtype
            ),
            stored.dtype,
            (rows, columns),
            workspace=WORKSPACE * rows * columns,
        )
    return found


def dequantized(parts: dict[str, torch.Tensor], size: int, dtype: torch.dtype) -> torch.Tensor:
    """[R, C] of the parts of one matrix, in fp32, rounded once to `dtype`."""
    codes_CR = _codes(parts["qweight"])
    columns = len(codes_CR)
    zeros_CR, scales_CR = (
        table.float().repeat_interleave(size, 0)[:columns]
        for table in (_codes(parts["qzeros"]), parts["scales"])
    )
    return ((codes_CR - zeros_CR) * scales_CR).to(dtype).T.contiguous()


def _codes(packed: torch.Tensor) -> torch.Tensor:
    codes = unpack_columns(packed, BITS)
    return codes.view(len(packed), -1, CODES)[..., PLACE].flatten(1)
