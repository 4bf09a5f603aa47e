"""Models given as a folder or a hub id: their location, fingerprint and companion files."""

import hashlib
import shutil
from functools import cache
from pathlib import Path

from camera.runtime.errors import CameraError
from camera.runtime.files import known_digest

TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "LICENSE*"]
TOKENIZER = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json"]
TOKENIZER += ["chat_template*", "*.model"]
COMPANIONS = [*TOKENIZER, "generation_config.json", "LICENSE*"]


def resolve_model(model: str, *, weights: bool = True, code: bool = False) -> Path:
    """The local folder of a model given by path or hub id; downloads from the hub.

    A hub id may end in `@` and a branch, tag or commit; without, it is the main branch as it stood
    when this process first asked. Without `weights` only config and tokenizer are fetched, with
    `code` its Python files too. CameraError: a folder without config.json, a name that is no hub
    id, a failed download.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise CameraError(f"model.path={model} is a folder without config.json.")
        return folder
    if model.startswith(("/", ".", "~")) or model.partition("@")[0].count("/") != 1:
        raise CameraError(
            f"model.path={model} is neither a folder nor a hub id of the form owner/name."
        )
    patterns = TEXT_FILES + ["*.safetensors"] * weights + ["*.py"] * code
    return _fetched(model, _commit(model), patterns)


@cache
def _commit(model: str) -> str:
    """The commit that a hub id stands for, the same for all that this process does."""
    revision = model.partition("@")[2] or None
    return revision_of(_fetched(model, revision, ["config.json"])) or ""


def _fetched(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    name = model.partition("@")[0]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen types; none can be handled further
        raise CameraError(
            f"model.path={model} can't be fetched from the hub ({type(error).__name__}): check the "
            "name and the network, or give a local folder."
        ) from error


def revision_of(folder: Path) -> str | None:
    """The commit of a model in the hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def fingerprint(folder: Path) -> str:
    """sha256 over all that a result depends on: config, weights, tokenizer, code beside them."""
    digest = hashlib.sha256()
    patterns = ("config.json", "*.safetensors", "*.py", *TOKENIZER)
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.is_file():
            digest.update(f"{path.name}:{known_digest(path)}".encode())
    return digest.hexdigest()


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config and licence from one checkpoint to another."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
