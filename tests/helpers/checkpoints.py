"""What checkpoints hold, and those that say one thing and hold another."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from camera.checkpoint.shards import INDEX, SINGLE


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint by name."""
    files = [*folder.glob("model-*.safetensors"), *folder.glob(SINGLE)]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def shards_of(folder: Path) -> dict[str, bytes]:
    """The bytes of its files of weights, and of their index, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def changed(source: Path, folder: Path, change=None, **keys) -> Path:
    """A copy of a checkpoint in one file, after `change` of its {name: tensor}, and with other keys
    of config.json (None removes one)."""
    shutil.copytree(source, folder)
    tensors = tensors_of(folder)
    tensors = (change and change(tensors)) or tensors
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink(missing_ok=True)
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / SINGLE, metadata={"format": "pt"})
    config = {k: v for k, v in (config_of(folder) | keys).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
