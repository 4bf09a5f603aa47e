"""Whole numbers of a few bits, several in an int32."""

from collections.abc import Iterator

import torch

from camera.checkpoint.places import Place
from camera.checkpoint.quantized.stored import StoredWeights


def unpack_columns(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [R, C 32 / bits] of int32 [R, C], the lowest bits first; bits 2, 4 or 8."""
    shift = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes = (packed[..., None] >> shift) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)


def matrices_of_codes(stored: StoredWeights) -> Iterator[tuple[str, dict[str, Place]]]:
    """(X, parts) of every X.qweight: its codes, X.qzeros and X.scales.

    CameraError for codes that aren't a matrix of int32, and for a part that is missing.
    """
    for key, place in stored.places.items():
        if not key.endswith(".qweight"):
            continue
        if place.dtype != torch.int32 or len(place.shape) != 2:
            stored.refuse(key, place, f"is {place.dtype} {list(place.shape)}, which no codes are")
        path, parts = key.removesuffix(".qweight"), {"qweight": place}
        for part in ("qzeros", "scales"):
            parts[part] = stored.part(key, f"{path}.{part}")
        yield path, parts
