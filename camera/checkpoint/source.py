"""Models given as a folder or a hub id: their location, fingerprint and companion files."""

import hashlib
import json
import shutil
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from camera.runtime.errors import CameraError
from camera.runtime.files import CheckpointFiles, known_digest

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What belongs to the weights of one checkpoint; all else of its folder travels with the model.
PICKLED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf", "*.ggml", "*.h5", "*.msgpack"]
PICKLED += ["*.onnx", "*.onnx_data", "*.npz", "*.tflite", "*.ot", "*.bin.index.json"]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json", *PICKLED]
OWN = ["config.json", "README.md", ".*", CheckpointFiles.REPORT, CheckpointFiles.EVALUATION]
FOLDERS = ["additional_chat_templates"]
ADAPTERS = ["adapter_config.json", "adapter_model.*"]
TOKENIZER = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json"]
TOKENIZER += ["chat_template*", "*.model"]


def resolve_model(
    model: str, *, weights: bool = True, subfolder: str | None = None, **hub: Any
) -> Path:
    """The local folder of a model given by path or hub id; downloads from the hub.

    A hub id may end in `@` and a branch, tag or commit; without, it is the main branch as it stood
    when this process first asked. Without `weights` only the other files are fetched; `hub` says
    how, in the terms of `snapshot_download`. CameraError: a folder without config.json or with an
    adapter, a name that is no hub id, a failed download.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        refuse_adapter(folder)
        if not (folder / "config.json").exists():
            raise CameraError(
                f"the model {model} is a folder without config.json: name one that holds a model."
            )
        return folder
    refuse_no_model(model)
    left = [*PICKLED, "consolidated*.safetensors", *["*/*.safetensors"] * (not subfolder)]
    left += ["*.safetensors"] * (not weights)
    folder = _fetched(model, _commit(model, **hub), ignore_patterns=left, **hub)
    folder = folder / (subfolder or "")
    refuse_adapter(folder)
    return folder


@cache
def _commit(model: str, **hub: Any) -> str:
    """The commit that a hub id stands for, the same for all that this process does."""
    revision = model.partition("@")[2] or None
    return revision_of(_fetched(model, revision, allow_patterns=["config.json"], **hub)) or ""


def _fetched(model: str, revision: str | None, **how: Any) -> Path:
    from huggingface_hub import snapshot_download

    name = model.partition("@")[0]
    try:
        return Path(snapshot_download(name, revision=revision or None, **how))
    except Exception as error:  # the hub client raises a dozen types; none can be handled further
        raise CameraError(
            f"the model {model} can't be fetched from the hub ({type(error).__name__}): check the "
            "name and the network, or give a local folder."
        ) from error


def refuse_no_model(model: str) -> None:
    """CameraError for what is neither a folder nor may be the id of a model on the hub."""
    if model.startswith(("/", ".", "~")) or model.partition("@")[0].count("/") != 1:
        raise CameraError(
            f"the model {model} is neither a folder nor a hub id of the form owner/name."
        )


def refuse_adapter(folder: Path) -> None:
    """CameraError if an adapter lies beside the weights: without it they are another model."""
    found = sorted(path.name for pattern in ADAPTERS for path in folder.glob(pattern))
    if found:
        raise CameraError(
            f"{folder} holds an adapter ({found[0]}): merge it into the model first, or remove it."
        )


def weight_map(index: Path) -> dict[str, str]:
    """{tensor: file} of an index; CameraError for one that can't be read or leaves the folder."""
    try:
        found = dict(json.loads(index.read_text())["weight_map"])
        strange = [key for key, name in found.items() if not _is_shard(name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CameraError(f"{index} is no valid index ({error}): download it again.") from error
    for key in strange:
        raise CameraError(
            f"{index} puts tensor '{key}' into {found[key]!r}, which is no file of that folder: "
            "download it again."
        )
    return found


def _is_shard(name: str) -> bool:
    return name not in ("", "..") and Path(name).name == name


def weight_files(folder: Path) -> list[Path]:
    """The files, of those there are, that a checkpoint's weights lie in."""
    index = folder / INDEX
    names = set(weight_map(index).values()) if index.exists() else {SINGLE}
    return [folder / name for name in sorted(names) if (folder / name).exists()]


def revision_of(folder: Path) -> str | None:
    """The commit of a model in the hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def fingerprint(folder: Path) -> str:
    """sha256 over all that a result depends on: config, weights, tokenizer, code beside them."""
    digest = hashlib.sha256()
    patterns = ("config.json", "*.py", *TOKENIZER)
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    for path in sorted(found | set(weight_files(folder))):
        if path.is_file():
            digest.update(f"{path.name}:{known_digest(path)}".encode())
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
