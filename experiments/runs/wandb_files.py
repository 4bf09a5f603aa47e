"""The folders that W&B writes below a run's: which one holds the run, and whether it is uploaded.

`wandb/offline-run-*` are kept offline; a marker beside its log says that one was uploaded. The
folder of an attempt that another one went on from is called `superseded-run-*`, a name that
`wandb sync` doesn't take.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from experiments.records.files import write_text

OFFLINE, ONLINE, SUPERSEDED = "offline-run-", "run-", "superseded-run-"


def folder_of(run: Path) -> Path:
    """Where W&B writes what belongs to a run's folder."""
    return run / "wandb"


def online_id(run: Path) -> str:
    """The id by which the run of this folder goes on in W&B; drawn once, and kept there."""
    file = folder_of(run) / "id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, secrets.token_hex(4))
    return file.read_text(encoding="utf-8").strip()


def supersede(run: Path) -> None:
    """Mark what earlier attempts kept offline: their run is about to be told anew."""
    for folder in kept_offline(run):
        folder.rename(folder.with_name(SUPERSEDED + folder.name.removeprefix(OFFLINE)))


def kept_offline(run: Path) -> list[Path]:
    """What was kept offline and holds a run that stands, oldest first."""
    return sorted(folder_of(run).glob(f"{OFFLINE}*"))


def unsent(run: Path) -> list[Path]:
    """What was kept offline and isn't uploaded."""
    return [folder for folder in kept_offline(run) if not any(folder.glob("*.wandb.synced"))]


def is_tracked(run: Path) -> bool:
    """Whether W&B was told of the run, offline or online."""
    return bool(kept_offline(run)) or any(folder_of(run).glob(f"{ONLINE}*"))
