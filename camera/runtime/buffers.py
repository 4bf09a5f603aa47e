"""Buffers whose memory returns to the operating system when freed.

malloc keeps what was freed below its mmap threshold (glibc: up to 32 MB, and that is most of a
checkpoint's tensors), for each thread apart: layers that are read in one thread, computed in
another and written in a third would pile up as pieces too small to be used again.
"""

import ctypes
import mmap
import os

import torch

# glibc's; others return what is free by themselves
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def allocate(size: int) -> torch.Tensor:
    """`size` bytes (uint8) of a mapping of their own."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def trim_heap() -> None:
    """Call glibc's `malloc_trim(0)`."""
    if _TRIM is not None:
        _TRIM(0)
