"""A table of hidden states in RAM or in an unlinked memory-mapped file.

Shapes: T tokens, H hidden.
"""

import mmap
import os
import tempfile
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from camera.runtime.errors import CameraError

# by the address of their memory, as long as a tensor lives in it
_MAPS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


class MappedTable:
    """A table [T, H] that is read and overwritten piece by piece.

    On disk if it is larger than `ram` bytes: then no more than the piece in use counts as the
    process's memory. The file has no name, so that nothing is left of it whatever happens. Raises
    CameraError if the disk has no room for it.
    """

    def __init__(
        self, tokens: int, hidden: int, dtype: torch.dtype, ram: float, folder: Path | None
    ):
        size = tokens * hidden * dtype.itemsize
        self._map: mmap.mmap | None = None
        if size <= ram:
            self._table_TH = torch.empty(tokens, hidden, dtype=dtype)
            return
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), size, folder)
            self._map = mmap.mmap(file.fileno(), size)
        self._table_TH = torch.frombuffer(self._map, dtype=dtype).view(tokens, hidden)
        _MAPS[self._table_TH.data_ptr()] = self._map

    @property
    def on_disk(self) -> bool:
        return self._map is not None

    def read(self, first: int, count: int) -> Tensor:
        """Rows [first, first + count), valid until they are written."""
        return self._table_TH[first : first + count]

    def write(self, first: int, hidden_BLH: Tensor) -> None:
        """Put rows in the place of those from `first` on."""
        rows_TH = hidden_BLH.reshape(-1, hidden_BLH.shape[-1])
        self._table_TH[first : first + len(rows_TH)] = rows_TH
        release_pages(self._table_TH)


def release_pages(states: Tensor) -> None:
    """Release the resident pages of a memory-mapped tensor. Other tensors are unchanged."""
    mapped = _MAPS.get(states.untyped_storage().data_ptr())
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)  # the file keeps its pages


def _reserve(file: int, size: int, folder: Path | None) -> None:
    # Without its blocks reserved, a full disk would kill the process where it writes a page.
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        raise CameraError(
            f"{folder or tempfile.gettempdir()} has no room for {size / 1e9:.1f} GB of hidden "
            f"states ({error.strerror}): free space there, set TMPDIR to another disk, or evaluate "
            f"fewer rows."
        ) from error
