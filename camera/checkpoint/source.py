"""Models given as a folder or a hub id: their location, fingerprint and companion files."""

import hashlib
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from camera.runtime.errors import CameraError
from camera.runtime.files import CheckpointFiles

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What belongs to the weights of one checkpoint; all else of its folder travels with the model.
PICKLED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf", "*.ggml", "*.h5", "*.msgpack"]
PICKLED += ["*.onnx", "*.onnx_data", "*.npz", "*.tflite", "*.ot", "*.bin.index.json"]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json", *PICKLED]
OWN = ["config.json", "README.md", ".*", CheckpointFiles.REPORT, CheckpointFiles.EVALUATION]
FOLDERS = ["additional_chat_templates"]
ADAPTERS = ["adapter_config.json", "adapter_model.*"]


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The local folder of a model given by path or hub id; downloads from the hub.

    Without `weights` only the other files are fetched. CameraError: a folder without config.json or
    with an adapter, a name that is no hub id, a failed download.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        refuse_adapter(folder)
        if not (folder / "config.json").exists():
            raise CameraError(f"model.path={model} is a folder without config.json.")
        return folder
    refuse_no_model(model)
    from huggingface_hub import snapshot_download

    left = [*PICKLED, "*/*.safetensors", "consolidated*.safetensors"]
    left += ["*.safetensors"] * (not weights)
    try:
        folder = Path(snapshot_download(model, ignore_patterns=left))
    except Exception as error:  # the hub client raises a dozen types; none can be handled further
        raise CameraError(
            f"model.path={model} can't be fetched from the hub ({type(error).__name__}): check the "
            "name and the network, or give a local folder."
        ) from error
    refuse_adapter(folder)
    return folder


def refuse_no_model(model: str) -> None:
    """CameraError for what is neither a folder nor may be the id of a model on the hub."""
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise CameraError(
            f"model.path={model} is neither a folder nor a hub id of the form owner/name."
        )


def refuse_adapter(folder: Path) -> None:
    """CameraError if an adapter lies beside the weights: without it they are another model."""
    found = sorted(path.name for pattern in ADAPTERS for path in folder.glob(pattern))
    if found:
        raise CameraError(
            f"{folder} holds an adapter ({found[0]}): merge it into the model first, or remove it."
        )


def weight_map(index: Path) -> dict[str, str]:
    """{tensor: file} of an index; CameraError for one that can't be read."""
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CameraError(f"{index} is no valid index ({error}): download it again.") from error


def weight_files(folder: Path) -> list[Path]:
    """The files, of those there are, that a checkpoint's weights lie in."""
    index = folder / INDEX
    names = set(weight_map(index).values()) if index.exists() else {SINGLE}
    return [folder / name for name in sorted(names) if (folder / name).exists()]


def fingerprint(folder: Path) -> str:
    """sha256 over config.json and every weight file's name, size and 64 KiB at 17 places of it."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for part in range(17):
                file.seek(max(0, (size - 65536) * part // 16))
                digest.update(file.read(65536))
    return digest.hexdigest()


def copy_companions(source: Path, target: Path) -> None:
    """Copy what isn't weights from one checkpoint to another: tokenizer, code, licences, templates.

    Files that belong to the checkpoint itself (config, index, reports) stay.
    """
    for path in source.iterdir():
        if path.is_dir() and path.name in FOLDERS:
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        elif path.is_file() and not any(fnmatch(path.name, p) for p in WEIGHTS + OWN):
            shutil.copyfile(path, target / path.name)
