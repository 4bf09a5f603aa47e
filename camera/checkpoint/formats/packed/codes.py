"""Codes of 1 to MAX_BITS bits, packed without gaps.

Code i takes bits i * b .. i * b + b - 1 of the run, counted from the lowest bit of the first byte,
so that eight codes take b bytes. P is the number of such periods.
"""

from functools import cache

import torch
from torch.nn import functional as F

from camera.runtime.errors import CameraError

MAX_BITS = 8


def check_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bits as int64; CameraError unless all lie in 1..MAX_BITS."""
    inside = not bits.numel() or 1 <= int(bits.min()) <= int(bits.max()) <= MAX_BITS
    if bits.is_floating_point() or not inside:
        raise CameraError(
            f"bits must be whole numbers from 1 to {MAX_BITS}: set `bits` or `group_bits`."
        )
    return bits.long()


def packed_bytes(count: int, bits: int) -> int:
    """ceil(count * bits / 8): bytes of a run of codes; at most 7 bits of them are padding."""
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers 0..2^bits - 1 of any shape as uint8 [packed_bytes]; ValueError if one is outside."""
    flat = codes.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise ValueError(f"codes must lie in 0..{2**bits - 1} to be packed in {bits} bits")
    codes_P8 = F.pad(flat.long(), (0, -flat.numel() % 8)).view(-1, 8)
    shift_8 = torch.arange(0, 8 * bits, bits, device=codes.device)
    lanes_P1 = (codes_P8 << shift_8).sum(1, keepdim=True)  # no two codes share a bit: + is or
    packed = lanes_P1.view(torch.uint8)[:, :bits].reshape(-1)
    return packed[: packed_bytes(flat.numel(), bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of a run, uint8 [count], on the run's device."""
    if bits == 8:
        return packed[:count]
    if 8 % bits == 0:
        # Whole codes in every byte: one look-up per byte beats shifting by far.
        return _table(bits, packed.device).index_select(0, packed.int()).view(torch.uint8)[:count]
    periods = -(-count // 8)
    if packed.numel() < periods * bits:
        packed = F.pad(packed, (0, periods * bits - packed.numel()))
    lanes_P = F.pad(packed.view(periods, bits), (0, 8 - bits)).view(torch.int64).view(-1)
    for codes in (4, 2, 1):
        # Halves of every field move apart: of 8 codes, of 4, of 2.
        low, high = _masks(bits, codes)
        lanes_P = (lanes_P & low) | ((lanes_P & high) << (codes * (8 - bits)))
    return lanes_P.view(torch.uint8)[:count]


@cache
def _table(bits: int, device: torch.device) -> torch.Tensor:
    """The codes of every byte, glued into one integer so that they are looked up together."""
    glued = {1: torch.int64, 2: torch.int32, 4: torch.int16}[bits]
    with torch.inference_mode(False):  # the table outlives the call
        byte_B1 = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
        shift_C = torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
        codes_BC = (byte_B1 >> shift_C) & (2**bits - 1)
        return codes_BC.contiguous().view(glued).view(-1)


@cache
def _masks(bits: int, codes: int) -> tuple[int, int]:
    """Low and high halves of the fields of 2 * codes codes, as signed 64-bit integers.

    Before this step a field starts at every 16 * codes bits and is 2 * codes * bits long.
    """
    half = (1 << (codes * bits)) - 1
    low = sum(half << start for start in range(0, 64, 16 * codes))
    high = low << (codes * bits)
    return tuple(mask - (1 << 64) if mask >> 63 else mask for mask in (low, high))
