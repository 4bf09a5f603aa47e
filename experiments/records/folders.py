"""The folders of a run, named after a hash of the settings that change its result."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camera.checkpoint.source import INDEX, SINGLE, weight_map
from camera.runtime.files import CheckpointFiles
from experiments.config.settings import Settings
from experiments.records.files import OutputFolder, RunFiles, is_json, lock_of, newer
from experiments.records.identity import compression_identity, evaluation_identity

log = logging.getLogger("camera")

NAME_BYTES = 200  # of the 255 of a file's name: the rest is the hash and what locks add


@dataclass(frozen=True)
class Folders:
    """The run's own folder, its checkpoint, and the statistics that runs share."""

    output: OutputFolder
    run: Path
    checkpoint: Path
    identity: dict[str, Any]

    @classmethod
    def of(cls, settings: Settings) -> Folders:
        """The folders of these settings; needs nothing but the model's folder, if it is local."""
        output = OutputFolder(Path(settings.output).expanduser())
        compression = compression_identity(settings)
        identity = compression | evaluation_identity(settings)
        name = _readable(f"{settings.model['name']}-{settings.method_name}")
        return cls(
            output,
            output.run(f"{name}-{_short_hash(identity)}"),
            output.checkpoint(f"{name}-{_short_hash(compression)}"),
            identity,
        )

    @property
    def files(self) -> RunFiles:
        """The files of the run."""
        return RunFiles(self.run)

    @property
    def report(self) -> Path:
        """What the compression reports: the last file that a checkpoint gets."""
        return self.checkpoint / CheckpointFiles.REPORT

    @property
    def evaluation(self) -> Path:
        """What was measured during the compression, if anything was."""
        return self.checkpoint / CheckpointFiles.EVALUATION

    @property
    def statistics(self) -> Path:
        """The statistics that the compression was planned by, if they are kept."""
        return self.checkpoint / CheckpointFiles.STATISTICS

    @property
    def is_compressed(self) -> bool:
        """Whether the checkpoint is there with its report and all its weights."""
        return is_json(self.report) and _has_weights(self.checkpoint)

    @property
    def partial(self) -> Path:
        """Where `camera.compress` builds the checkpoint until it is complete."""
        return self.checkpoint.with_name(f".{self.checkpoint.name}.partial")

    def remove_outputs(self, before: float) -> None:
        """Remove the run and its checkpoint, whole or partial, unless finished since that time."""
        if not newer(self.files.done, before):
            shutil.rmtree(self.run, ignore_errors=True)
        with lock_of(self.checkpoint):
            if not newer(self.report, before):
                shutil.rmtree(self.checkpoint, ignore_errors=True)
                # A killed run's remains: redoing is not going on from there.
                shutil.rmtree(self.partial, ignore_errors=True)

    def remove_damaged_checkpoint(self) -> None:
        """Make room for a new one where a power cut or a copy left less than a whole one."""
        if self.checkpoint.exists():
            log.warning("%s is damaged: it is made again.", self.checkpoint)
            shutil.rmtree(self.checkpoint)

    def discard_checkpoint(self) -> None:
        """Remove the checkpoint, when no other run is reading it."""
        with lock_of(self.checkpoint):
            shutil.rmtree(self.checkpoint, ignore_errors=True)


def _has_weights(checkpoint: Path) -> bool:
    """Whether every file of weights is there that the index names, or the one that needs none."""
    index = checkpoint / INDEX
    if not index.exists():
        return (checkpoint / SINGLE).exists()
    if not is_json(index):
        return False
    shards = set(weight_map(index).values())
    return all((checkpoint / shard).exists() for shard in shards)


def cost_class(model: str, method: str, identity: dict[str, Any]) -> tuple[str, str, str]:
    """What runs of about the same duration share: model, method, a hash of what is measured."""
    return model, method, _short_hash(identity["evaluation"])


def _readable(name: str) -> str:
    """The name as a part of a file's, whose length file systems count in bytes."""
    kept = re.sub(r"[^\w.+-]+", "_", name).encode()[:NAME_BYTES]
    return kept.decode(errors="ignore")


def _short_hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
