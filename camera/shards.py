"""safetensors checkpoints on disk: read a part lazily, write a shard at a time."""

import json
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from camera.errors import CameraError

log = logging.getLogger("camera")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class ShardReader:
    """Lazy view of a one-file or sharded checkpoint; refuses what is missing or corrupt at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        index, single = folder / INDEX, folder / SINGLE
        if index.exists():
            names = _weight_map(index)
            self.files = {key: folder / name for key, name in names.items()}
        elif single.exists():
            self.files = dict.fromkeys(self._header(single), single)
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
        self._check()

    def _check(self) -> None:
        for path in sorted(set(self.files.values())):
            if not path.exists():
                raise CameraError(
                    f"shard {path.name} is listed in {INDEX} but missing from {self.folder}: "
                    "download the model again."
                )
            header = self._header(path)
            lost = next((k for k, f in self.files.items() if f == path and k not in header), None)
            if lost is not None:
                raise CameraError(
                    f"tensor '{lost}' is not in shard {path}, where {INDEX} puts it: download the "
                    "model again."
                )

    def _header(self, path: Path) -> set[str]:
        try:
            with safe_open(path, "pt") as file:
                return set(file.keys())
        except (SafetensorError, OSError) as error:
            raise CameraError(
                f"shard {path} is truncated or corrupt ({error}): download it again."
            ) from error

    def slices(self, wanted: Callable[[str], bool], stack: ExitStack) -> dict[str, Any]:
        """{key: lazy slice} of the keys that `wanted` accepts; `stack` closes the files."""
        handles: dict[Path, Any] = {}
        found = {}
        for key, path in self.files.items():
            if wanted(key):
                if path not in handles:
                    handles[path] = stack.enter_context(safe_open(path, "pt", device="cpu"))
                found[key] = handles[path].get_slice(key)
        return found

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum(path.stat().st_size for path in set(self.files.values()))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CameraError(f"{index} is no valid index ({error}): download it again.") from error


class ShardWriter:
    """Writes a checkpoint shard by shard into a folder, each file appearing whole or not at all."""

    def __init__(self, folder: Path, shards: int):
        self.folder, self.shards = folder, shards
        self.weight_map: dict[str, str] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.files: dict[str, int] = {}

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write one shard."""
        name = f"model-{len(self.files) + 1:05d}-of-{self.shards:05d}.safetensors"
        whole = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        path, partial = self.folder / name, self.folder / f".{name}.partial"
        try:
            save_file(whole, partial, metadata={"format": "pt"})
            replace_durably(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise CameraError(
                f"can't write {path} ({error}): free space on that disk or set output elsewhere."
            ) from error
        self.files[name] = path.stat().st_size
        for key, tensor in whole.items():
            self.weight_map[key] = name
            self.sizes[key] = (tensor.numel(), tensor.numel() * tensor.element_size())

    def state(self) -> dict[str, Any]:
        """What has been written so far, for `restore`."""
        return {"weight_map": self.weight_map, "sizes": self.sizes, "files": self.files}

    def restore(self, state: dict[str, Any]) -> bool:
        """Take up the work of another writer; False if a file is not as it was left."""
        for name, size in state["files"].items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size != size:
                log.warning("%s is not as it was written: starting anew.", path)
                return False
        self.weight_map, self.files = state["weight_map"], state["files"]
        self.sizes = {name: tuple(size) for name, size in state["sizes"].items()}
        return True

    @property
    def bytes(self) -> int:
        """Size of the files written."""
        return sum(self.files.values())

    def close(self) -> None:
        """Write the index; the checkpoint's tensors are then complete."""
        if len(self.files) != self.shards:
            raise RuntimeError(f"{len(self.files)} of {self.shards} shards were written")
        index = {
            "metadata": {"total_size": sum(size for _, size in self.sizes.values())},
            "weight_map": dict(sorted(self.weight_map.items())),
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def replace_durably(partial: Path, path: Path) -> None:
    """Rename a finished file into place once its bytes are on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
