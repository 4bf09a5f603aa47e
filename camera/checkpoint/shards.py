"""Reading of safetensors checkpoints by part, and writing by shard."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from camera.checkpoint.places import (
    CPU,
    DTYPES,
    AnyPlace,
    PackedPlace,
    Place,
    places_of,
    read_places,
)
from camera.checkpoint.source import INDEX, SINGLE, weight_map
from camera.runtime.device.accelerator import has_own_memory
from camera.runtime.device.staging import Staging
from camera.runtime.errors import CameraError
from camera.runtime.files import digest_of, replace_durably
from camera.runtime.mapped import release_pages

log = logging.getLogger("camera")
Sizes = dict[str, tuple[int, int]]
"""Of each tensor how many numbers and bytes it has."""


class ShardReader:
    """A one-file or sharded checkpoint; CameraError for a missing or corrupt shard.

    Tensors are read, not mapped: pages of a mapping count as the process's memory until the file
    is closed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.left_out: dict[str, AnyPlace] = {}
        index, single = folder / INDEX, folder / SINGLE
        if index.exists() and single.exists() and SINGLE not in weight_map(index).values():
            raise CameraError(
                f"{folder} holds {SINGLE} and {INDEX}, which may be two models: remove one of them."
            )
        if index.exists():
            names = weight_map(index)
        elif single.exists():
            names = None
        else:
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
                p.name for p in folder.glob("*.pt*")
            )
            if pickles:
                raise CameraError(
                    f"{folder} holds pickled weights only ({pickles[0]}): convert them to "
                    "safetensors; pickle files can run code and are never loaded."
                )
            raise CameraError(
                f"{folder} holds no {SINGLE} and no {INDEX}: give model.path a folder with "
                "safetensors weights."
            )
        found = places_of(single) if names is None else self._indexed(names)
        self.places: dict[str, AnyPlace] = dict(found)
        self.held = found  # by the names in the files
        self.quantisation: dict[str, Any] | None = None  # by which places are unpacked
        self._files = {place.file for place in self.places.values()}

    def _indexed(self, names: dict[str, str]) -> dict[str, Place]:
        headers: dict[str, dict[str, Place]] = {}
        for name in sorted(set(names.values())):
            path = self.folder / name
            if not path.exists():
                raise CameraError(
                    f"shard {name} is listed in {INDEX} but missing from {self.folder}: "
                    "download the model again."
                )
            headers[name] = places_of(path)
        lost = next((key for key, name in names.items() if key not in headers[name]), None)
        if lost is not None:
            raise CameraError(
                f"tensor '{lost}' is not in shard {self.folder / names[lost]}, where {INDEX} puts "
                "it: download the model again."
            )
        # what a shard holds counts whether the index lists it or not, as in transformers
        places: dict[str, Place] = {}
        for name, found in headers.items():
            for key in places.keys() & found.keys():
                if not _are_equal(places[key], found[key]):
                    raise CameraError(
                        f"{self.folder} holds two different tensors '{key}', in shards "
                        f"{places[key].file.name} and {name}: download the model again."
                    )
            places |= found
        return places

    def read(
        self, wanted: Callable[[str], bool], device: torch.device = CPU
    ) -> dict[str, torch.Tensor]:
        """Tensors of the keys that `wanted` accepts, on a device."""
        places = {key: place for key, place in self.places.items() if wanted(key)}
        return read_places(places, device)

    def leave_out(self, keys: Iterable[str]) -> None:
        """Forget tensors, which then count nowhere."""
        self.left_out |= {key: self.places.pop(key) for key in list(keys)}

    def main_dtype(self) -> torch.dtype:
        """The floating-point type that most numbers are stored in; CameraError if there is none."""
        numbers: Counter[torch.dtype] = Counter()
        for place in self.places.values():
            if place.dtype.is_floating_point:
                numbers[place.dtype] += place.bytes // place.dtype.itemsize
        if not numbers:
            raise CameraError(
                f"{self.folder} holds no floating-point tensor: start from unquantised weights."
            )
        return numbers.most_common(1)[0][0]

    @property
    def unpacking(self) -> int:
        """Bytes that reading a tensor takes at most beside the tensor itself."""
        packed = [place for place in self.places.values() if isinstance(place, PackedPlace)]
        return max((p.workspace + sum(part.bytes for part in p.stored) for p in packed), default=0)

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk, less the tensors that were left out."""
        unused = sum(part.bytes for place in self.left_out.values() for part in place.stored)
        return sum(path.stat().st_size for path in self._files) - unused


def _are_equal(one: Place, other: Place) -> bool:
    """Whether two tensors are the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    found = read_places({"one": one, "other": other})
    return torch.equal(*(tensor.view(-1).view(torch.uint8) for tensor in found.values()))


class ShardWriter:
    """Writes a checkpoint shard by shard; a shard's file appears complete or not at all."""

    def __init__(self, folder: Path, shards: int):
        self.folder, self.shards = folder, shards
        self.weight_map: dict[str, str] = {}
        self.sizes: Sizes = {}
        self.files: dict[str, int] = {}
        self.digests: dict[str, str] = {}

    def add(
        self,
        index: int,
        tensors: dict[str, torch.Tensor],
        sizes: Sizes | None = None,
    ) -> None:
        """Write shard `index` (from 0); `sizes` are those of the tensors' names in memory."""
        name = f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"
        twice = [key for key in tensors if self.weight_map.get(key, name) != name]
        if twice:
            raise RuntimeError(f"tensor '{twice[0]}' is written twice")
        path, partial = self.folder / name, self.folder / f".{name}.partial"
        try:
            write_tensors(tensors, partial)
            replace_durably(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CameraError(
                f"can't write {path} ({error}): free space on that disk or set output elsewhere."
            ) from error
        self.files[name], self.digests[name] = path.stat().st_size, digest_of(path)
        self.weight_map |= dict.fromkeys(tensors, name)
        self.sizes |= sizes or sizes_of(tensors)

    def state(self) -> dict[str, Any]:
        """The shards written so far, for `restore`."""
        return {
            "weight_map": self.weight_map,
            "sizes": self.sizes,
            "files": self.files,
            "digests": self.digests,
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Continue another writer's checkpoint; False if a file has changed since."""
        for name, digest in state["digests"].items():
            path = self.folder / name
            if not path.exists() or digest_of(path) != digest:
                log.warning("%s is not as it was written: starting anew.", path)
                return False
        self.weight_map, self.files = state["weight_map"], state["files"]
        self.digests = state["digests"]
        self.sizes = {name: tuple(size) for name, size in state["sizes"].items()}
        return True

    @property
    def bytes(self) -> int:
        """Size of the files written."""
        return sum(self.files.values())

    def close(self, **about: str) -> None:
        """Write the index, after the last shard; `about` stands in its metadata."""
        if len(self.files) != self.shards:
            raise RuntimeError(f"{len(self.files)} of {self.shards} shards were written")
        index = {
            "metadata": {"total_size": sum(size for _, size in self.sizes.values()), **about},
            "weight_map": dict(sorted(self.weight_map.items())),
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def sizes_of(tensors: dict[str, torch.Tensor]) -> Sizes:
    """Numbers and bytes of each tensor."""
    return {key: (t.numel(), t.numel() * t.element_size()) for key, t in tensors.items()}


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as a safetensors file, one after the other.

    safetensors' own writer first copies all of them, a whole layer once more in memory. This one
    copies a tensor only to make it contiguous, and from a device through buffers of a fixed size,
    on the current stream.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {dtype: name for name, dtype in DTYPES.items()}
    # the largest elements first keeps every tensor aligned, as safetensors itself does
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    end = 0
    for key in order:
        tensor = tensors[key]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for device, keys in groupby(order, key=lambda key: tensors[key].device):
            if has_own_memory(device):
                for view in Staging(device).download(tensors[key] for key in keys):
                    file.write(view)
                continue
            for key in keys:
                whole = tensors[key].detach().cpu().contiguous().reshape(-1)
                file.write(whole.view(torch.uint8).numpy().data)
                release_pages(tensors[key])
