"""Where tensors lie in safetensors files, and reading them from there."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from camera.runtime.buffers import allocate
from camera.runtime.device.accelerator import has_own_memory
from camera.runtime.device.staging import Staging
from camera.runtime.errors import CameraError

CPU = torch.device("cpu")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Place:
    """Location of a tensor: raw bytes at an offset of a safetensors file."""

    file: Path
    start: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, first: int, count: int) -> "Place":
        """The part of a table from row `first` on, of at most `count` rows."""
        size, count = self.bytes // self.shape[0], min(count, self.shape[0] - first)
        shape, start = (count, *self.shape[1:]), self.start + first * size
        return replace(self, start=start, bytes=count * size, shape=shape)

    @property
    def stored(self) -> tuple["Place", ...]:
        """The tensors on disk that it is read from."""
        return (self,)


Unpack = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""unpack(parts): the plain tensor, on their device."""


@dataclass(frozen=True)
class PackedPlace:
    """A plain tensor that is unpacked, as it is read, from several stored ones.

    stacked: the parts have as many rows as the tensor. workspace: bytes that unpacking it takes
    beside the parts and the result.
    """

    parts: Mapping[str, Place]
    unpack: Unpack
    dtype: torch.dtype
    shape: tuple[int, ...]
    workspace: int = 0
    stacked: bool = False

    @property
    def stored(self) -> tuple[Place, ...]:
        """The tensors on disk that it is read from."""
        return tuple(self.parts.values())

    @property
    def file(self) -> Path:
        """The file of its first part."""
        return self.stored[0].file

    @property
    def start(self) -> int:
        """Where its first part lies."""
        return self.stored[0].start

    @property
    def bytes(self) -> int:
        """Of the plain tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> "PackedPlace":
        """The part of a table from row `first` on, of at most `count` rows."""
        count = min(count, self.shape[0] - first)
        shape = (count, *self.shape[1:])
        if self.stacked:
            parts = {name: part.rows(first, count) for name, part in self.parts.items()}
            return replace(self, parts=parts, shape=shape)
        return replace(
            self, unpack=lambda parts: self.unpack(parts)[first : first + count], shape=shape
        )


AnyPlace = Place | PackedPlace


def read_places(
    places: Mapping[str, AnyPlace], device: torch.device = CPU
) -> dict[str, torch.Tensor]:
    """Tensors at these places, read in the order of the files.

    Copies to a device with memory of its own run on the current stream, and aren't waited for.
    """
    found: dict[str, torch.Tensor] = {}
    staging = Staging(device) if places and has_own_memory(device) else None
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}

        def read(place: Place) -> torch.Tensor:
            if place.file not in files:
                files[place.file] = stack.enter_context(place.file.open("rb", buffering=0))
            return _read(files[place.file], place, staging)

        for key, place in sorted(places.items(), key=lambda item: (item[1].file, item[1].start)):
            if isinstance(place, PackedPlace):
                parts = {name: read(part) for name, part in place.parts.items()}
                found[key] = place.unpack(parts)
            else:
                found[key] = read(place)
    return found


def places_of(path: Path) -> dict[str, Place]:
    """Places of a file's tensors; safetensors checks that the file is complete."""
    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise CameraError(
            f"shard {path} is truncated or corrupt ({error}): download it again."
        ) from error
    places = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CameraError(
                f"tensor '{key}' in {path} has the type {entry['dtype']}, which this "
                f"package doesn't read ({', '.join(DTYPES)})."
            )
        start, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        places[key] = Place(path, 8 + length + start, end - start, dtype, shape)
    return places


def _read(file: BinaryIO, place: Place, staging: Staging | None = None) -> torch.Tensor:
    file.seek(place.start)

    def fill(view: memoryview) -> None:
        done = 0
        while done < len(view):  # one read gives 2 GB at most
            got = file.readinto(view[done:])
            if not got:
                raise CameraError(f"shard {place.file} ends early: download it again.")
            done += got

    if staging is not None:
        raw = staging.upload(place.bytes, fill)
    else:
        raw = allocate(place.bytes)
        fill(memoryview(raw.numpy()))
    return raw.view(place.dtype).view(place.shape)
