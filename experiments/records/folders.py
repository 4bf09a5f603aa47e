"""The folders of a run, named by model, method, ratio and a hash of what changes its result."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camera.checkpoint.source import INDEX, SINGLE, weight_map
from camera.runtime.errors import CameraError
from camera.runtime.files import CheckpointFiles, partial_of
from experiments.config.settings import Settings
from experiments.records.files import (
    OutputFolder,
    RunFiles,
    is_json,
    lock_of,
    newer,
    read_json,
)
from experiments.records.identity import compression_identity, evaluation_identity

log = logging.getLogger("camera")

NAME_BYTES = 200  # of the 255 of a file's name: the rest is the hashes and what locks add
COMPRESSION_DIGITS, EVALUATION_DIGITS = 6, 4  # of the hashes, behind model, method and ratio


@dataclass(frozen=True)
class Folders:
    """The run's own folder, its checkpoint, and the statistics that runs share."""

    output: OutputFolder
    run: Path
    checkpoint: Path
    identity: dict[str, Any]

    @classmethod
    def of(cls, settings: Settings) -> Folders:
        """The folders of these settings; needs nothing but the model's folder, if it is local.

        A run is called as its checkpoint, and further by what is measured. Folders that were named
        in the old way, a hash of ten digits for each, keep their names.
        """
        output = OutputFolder(Path(settings.output).expanduser())
        compression, evaluation = compression_identity(settings), evaluation_identity(settings)
        identity = compression | evaluation
        name = f"{settings.model['name']}-{settings.method_name}"
        ratio = ratio_of(settings.method)
        made = _readable(f"{name}-{ratio}" if ratio else name)
        made = f"{made}-{_hash(compression, COMPRESSION_DIGITS)}"
        measured = f"{made}-{_hash(evaluation, EVALUATION_DIGITS)}"
        old = _readable(name)
        return cls(
            output,
            _existing(output.run(f"{old}-{_hash(identity)}")) or output.run(measured),
            _existing(output.checkpoint(f"{old}-{_hash(compression)}")) or output.checkpoint(made),
            identity,
        )

    @property
    def name(self) -> str:
        """What the log calls the run: its checkpoint's name, which the run's begins with."""
        return self.checkpoint.name

    def check_name(self) -> None:
        """CameraError where a run of another compression has this one's short hash, too."""
        for run in self.run.parent.glob(f"{glob.escape(self.name)}-*"):
            settings = RunFiles(run).settings
            other = read_json(settings).get("identity", {}) if is_json(settings) else {}
            if "model" in other and _compression(other) != _compression(self.identity):
                raise CameraError(
                    f"{run} is of other settings and happens to have the same name: set output to "
                    "another folder."
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
        return partial_of(self.checkpoint)

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
    return model, method, _hash(identity["evaluation"])


def ratio_of(method: dict[str, Any]) -> str:
    """The ratio in a name: 40 for a sparsity of 0.4, 2.5bit for bits; nothing for neither."""
    if method.get("sparsity") is not None:
        return f"{100 * method['sparsity']:.10g}"
    return f"{method['bits']:.10g}bit" if method.get("bits") is not None else ""


def _existing(folder: Path) -> Path | None:
    return folder if folder.exists() or partial_of(folder).exists() else None


def _compression(identity: dict[str, Any]) -> dict[str, Any]:
    """What of a run's identity its compression depends on, as JSON has it."""
    left = ["evaluation", "data", "computed", "versions"]
    left += [] if "calibration" in identity else ["seed"]
    about = {key: value for key, value in identity.items() if key not in left}
    versions = identity.get("versions", {})
    about["versions"] = [versions.get(package) for package in ("torch", "transformers")]
    return json.loads(json.dumps(about))


def _readable(name: str) -> str:
    """The name as a part of a file's, whose length file systems count in bytes."""
    kept = re.sub(r"[^\w.+-]+", "_", name).encode()[:NAME_BYTES]
    return kept.decode(errors="ignore")


def _hash(identity: dict[str, Any], digits: int = 10) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:digits]
