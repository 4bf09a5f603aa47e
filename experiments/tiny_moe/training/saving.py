"""What training leaves on disk: a checkpoint to go on from, and the finished model's folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def replace_folder(write: Callable[[Path], object], folder: Path) -> None:
    """Lets `write` fill a new folder beside `folder`, then puts it in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    fresh.chmod(0o755)
    write(fresh)
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def export(model, tokenizer, record: dict, folder: Path) -> None:
    """Writes the model in bf16 with its tokenizer and training record."""

    def write(fresh: Path) -> None:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        for path in fresh.iterdir():  # safetensors creates its files for the owner alone
            path.chmod(0o644)

    replace_folder(write, folder)


def save_checkpoint(path: Path, model, optimizer, step: int, record: dict) -> None:
    """Everything a restart needs, in one file that appears at once."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"step": step, "record": record, "rng": torch.get_rng_state()}
    fresh = path.with_suffix(".fresh")
    torch.save(state, fresh)
    os.replace(fresh, path)


def load_checkpoint(path: Path, model, optimizer) -> tuple[int, dict]:
    """Puts a checkpoint's state back; returns its step and record."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["step"], state["record"]
