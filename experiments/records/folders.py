"""Where a run's files are: folders named after a hash of what changes the result."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from camera import __version__
from camera.checkpoint.source import fingerprint
from experiments.config.location import EMBEDDED
from experiments.config.settings import Settings, arguments
from experiments.tiny_moe import layout

LOG = "log.txt"  # in a run's folder

# What is a matter of the machine: a run that ran out of memory goes on with a smaller batch
# instead of starting again.
MACHINE = ("batch_size", "perplexity_batch_size", "stream", "unpack")


@dataclass(frozen=True)
class Folders:
    """The run's own folder, its checkpoint, and the statistics that runs share."""

    output: Path
    run: Path
    checkpoint: Path
    identity: dict[str, Any]

    @classmethod
    def of(cls, settings: Settings) -> Folders:
        """The folders of these settings; needs nothing but the model's folder, if it is local."""
        output = Path(settings.output).expanduser()
        compression = _compression(settings)
        identity = compression | _evaluation(settings)
        name = re.sub(r"[^\w.+-]+", "_", f"{settings.model['name']}-{settings.method_name}")
        return cls(
            output,
            output / "runs" / f"{name}-{_short_hash(identity)}",
            output / "checkpoints" / f"{name}-{_short_hash(compression)}",
            identity,
        )

    @property
    def statistics(self) -> Path:
        """One pass over the dense model serves every alpha and sparsity."""
        return self.output / "statistics"

    def part(self, name: str) -> Path:
        """The file of one part of the run: compress, perplexity-CORPUS, task-NAME."""
        return self.run / f"{name}.json"

    @property
    def done(self) -> bool:
        return (self.run / "DONE").exists()

    @property
    def compressed(self) -> bool:
        """camera.json is the last file that a checkpoint gets."""
        return (self.checkpoint / "camera.json").exists()

    @property
    def partial(self) -> Path:
        """Where `camera.compress` builds the checkpoint until it is complete."""
        return self.checkpoint.with_name(f".{self.checkpoint.name}.partial")

    def lock(self, what: Path) -> FileLock:
        """A lock between processes on one of these folders."""
        return lock(lock_file(what))

    def forget(self, before: float) -> None:
        """Remove the run and its checkpoint, whole or partial, unless finished since that time."""
        if not newer(self.run / "DONE", before):
            shutil.rmtree(self.run, ignore_errors=True)
        with self.lock(self.checkpoint):
            if not newer(self.checkpoint / "camera.json", before):
                shutil.rmtree(self.checkpoint, ignore_errors=True)
                # A killed run's remains: redoing is not going on from there.
                shutil.rmtree(self.partial, ignore_errors=True)

    def discard_checkpoint(self) -> None:
        """Remove the checkpoint, when no other run is reading it."""
        with self.lock(self.checkpoint):
            shutil.rmtree(self.checkpoint, ignore_errors=True)


def lock(file: Path) -> FileLock:
    """A lock between processes, by this file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file)


def lock_file(folder: Path) -> Path:
    """The lock of a run's, or a checkpoint's, folder: beside the folder of all of them."""
    return folder.parent.parent / "locks" / f"{folder.parent.name}-{folder.name}.lock"


def held(folder: Path) -> bool:
    """Whether a live process holds the lock of this folder."""
    file = lock_file(folder)
    if not file.exists():
        return False
    try:
        with FileLock(file).acquire(timeout=0):
            return False
    except Timeout:
        return True


def alike(model: str, method: str, identity: dict[str, Any]) -> tuple[str, str, str]:
    """What runs share that take about as long: model, method, a hash of what is measured."""
    return model, method, _short_hash(identity["evaluation"])


def newer(file: Path, than: float) -> bool:
    """Whether the file was written at that time or later."""
    return file.exists() and file.stat().st_mtime >= than


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _compression(settings: Settings) -> dict[str, Any]:
    identity = {
        "camera": __version__,
        "model": _contents(settings.model_path),
        "method": {"name": settings.method_name, **arguments(settings.method)},
        "dtype": settings.dtype,
    }
    if settings.calibrates:
        identity["calibration"] = arguments(settings.calibration)
        identity["propagate"] = settings.propagate
        identity["data"] = _place(settings.data)
        identity["seed"] = settings.seed
    return identity


def _evaluation(settings: Settings) -> dict[str, Any]:
    kept = {key: value for key, value in settings.evaluation.items() if key not in MACHINE}
    if not kept["speed"]["batch_sizes"]:
        del kept["speed"]
    return {"evaluation": kept, "data": _place(settings.data), "seed": settings.seed}


def _contents(model: str) -> str:
    # What is in a local folder rather than where it is: it may move, and may be trained again.
    folder = Path(model).expanduser()
    return fingerprint(folder) if (folder / "config.json").is_file() else model


def _place(data: str) -> str:
    if data == EMBEDDED:
        # What the generator writes rather than its name: other texts give other results.
        return f"{EMBEDDED}-{layout.fingerprint()}"
    folder = Path(data).expanduser()
    return str(folder.resolve()) if folder.is_dir() else data


def _short_hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
