"""The folders of a run, named after a hash of the settings that change its result."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config.settings import Settings
from experiments.records.files import OutputFolder, RunFiles, lock_of, newer
from experiments.records.identity import compression_identity, evaluation_identity


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
        name = re.sub(r"[^\w.+-]+", "_", f"{settings.model['name']}-{settings.method_name}")
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
        return self.checkpoint / "camera.json"

    @property
    def evaluation(self) -> Path:
        """What was measured during the compression, if anything was."""
        return self.checkpoint / "evaluation.json"

    @property
    def statistics(self) -> Path:
        """The statistics that the compression was planned by, if they are kept."""
        return self.checkpoint / "statistics.safetensors"

    @property
    def is_compressed(self) -> bool:
        return self.report.exists()

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

    def discard_checkpoint(self) -> None:
        """Remove the checkpoint, when no other run is reading it."""
        with lock_of(self.checkpoint):
            shutil.rmtree(self.checkpoint, ignore_errors=True)


def cost_class(model: str, method: str, identity: dict[str, Any]) -> tuple[str, str, str]:
    """What runs of about the same duration share: model, method, a hash of what is measured."""
    return model, method, _short_hash(identity["evaluation"])


def _short_hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
