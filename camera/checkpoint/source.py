"""Models given as a folder or a hub id: their location, fingerprint and companion files."""

import hashlib
import shutil
from pathlib import Path

from camera.runtime.errors import CameraError

TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "LICENSE*"]
COMPANIONS = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json"]
COMPANIONS += ["chat_template*", "*.model", "generation_config.json", "LICENSE*"]


def resolve_model(model: str, *, weights: bool = True, code: bool = False) -> Path:
    """The local folder of a model given by path or hub id; downloads from the hub.

    Without `weights` only config and tokenizer are fetched, with `code` its Python files too.
    CameraError: a folder without config.json, a name that is no hub id, a failed download.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise CameraError(f"model.path={model} is a folder without config.json.")
        return folder
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise CameraError(
            f"model.path={model} is neither a folder nor a hub id of the form owner/name."
        )
    from huggingface_hub import snapshot_download

    patterns = TEXT_FILES + ["*.safetensors"] * weights + ["*.py"] * code
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen types; none can be handled further
        raise CameraError(
            f"model.path={model} can't be fetched from the hub ({type(error).__name__}): check the "
            "name and the network, or give a local folder."
        ) from error


def fingerprint(folder: Path) -> str:
    """sha256 over config.json and every weight file's name, size and 64 KiB at 17 places of it."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for part in range(17):
                file.seek(max(0, (size - 65536) * part // 16))
                digest.update(file.read(65536))
    return digest.hexdigest()


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config and licence from one checkpoint to another."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
