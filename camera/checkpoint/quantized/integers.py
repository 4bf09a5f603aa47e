"""Whole numbers of a few bits, several in an int32."""

import torch


def unpack_columns(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [R, C 32 / bits] of int32 [R, C], the lowest bits first; bits 2, 4 or 8."""
    shift = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes = (packed[..., None] >> shift) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)
