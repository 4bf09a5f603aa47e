"""Progress of an unfinished pass, for resuming.

A folder holds, after every finished layer: the state (JSON), the hidden states that the next layer
needs, the statistics gathered so far. The state file is replaced last and holds a digest of what it
names, which is on the disk by then; whatever else lies there is ignored and overwritten.

Shapes: B samples of a batch, L tokens of a sample, H hidden.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from camera.calibration.statistics import LayerStatistics, Statistics
from camera.checkpoint.shards import write_tensors
from camera.method import LayerPlan, Plan
from camera.runtime import distributed
from camera.runtime.errors import CameraError
from camera.runtime.files import digest_of, sync, write_json

log = logging.getLogger("camera")
# What of a fingerprint no user sets: half-done work is dropped where it differs.
COMPUTED_BY = {"code", "device", "processes", "matmul_precision", "versions"}


class PassProgress:
    """The state of an unfinished pass over the layers, in a folder of its own."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.done = 0  # layers
        self.files: dict[str, str] = {}  # digests of the files that are kept, by name
        self.state: dict[str, Any] = {}
        self.seconds_before = 0.0  # spent on those layers by killed runs
        self._started = perf_counter()
        self._rank = f"-{distributed.rank()}" if distributed.rank() else ""

    def restore(self) -> bool:
        """Read what an earlier run left; True if there is something to go on from.

        What another version of the code, another device or another number of processes left is
        dropped, with a warning, and so is what is damaged. Raises CameraError, with the difference,
        if it was left by other settings.
        """
        found = self._found()
        self.done = distributed.all_min(found["done"])
        whole = self.done > 0 and self._is_whole(found["files"])
        if not distributed.all_min(whole):
            self.clear()
            return False
        self.state, self.files = found["state"], found["files"]
        self.seconds_before = found.get("seconds", 0.0)
        return True

    @property
    def seconds(self) -> float:
        """Time spent on the pass so far, by killed runs and by this one."""
        return self.seconds_before + perf_counter() - self._started

    def commit(
        self,
        done: int,
        state: dict[str, Any],
        hidden: list[torch.Tensor],
        seen: LayerStatistics | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Record that `done` layers are finished; `hidden` are the inputs of the next one, `seen`
        and `plan` the statistics and the plan of the last one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            if seen is not None and distributed.rank() == 0:
                Statistics({done - 1: seen}, {}).save(self._statistics_file(done - 1))
                self._keep(self._statistics_file(done - 1))
            if plan is not None and distributed.rank() == 0:
                plan.save(self._plan_file(done - 1))
                self._keep(self._plan_file(done - 1))
            if hidden:
                tensors = {str(i): hidden_BLH for i, hidden_BLH in enumerate(hidden)}
                write_tensors(tensors, self._hidden_file(done))
                self._keep(self._hidden_file(done))
            # of several processes one may be a layer ahead when they are killed
            gone = self._hidden_file(self.done if distributed.world() == 1 else self.done - 1)
            self.files.pop(gone.name, None)
            content = {"fingerprint": self.fingerprint, "done": done, "state": state}
            content |= {"files": self.files, "seconds": self.seconds}
            write_json(self._state_file, content)
        except (OSError, SafetensorError) as error:
            raise CameraError(
                f"can't write {self.folder} ({error}): free space on that disk, then run the same "
                "command again to go on from here."
            ) from error
        gone.unlink(missing_ok=True)
        self.done, self.state = done, state

    def hidden(self) -> list[torch.Tensor]:
        """The inputs of the layer to go on with, a tensor [B, L, H] per batch."""
        tensors = load_file(self._hidden_file(self.done))
        return [tensors[str(i)] for i in range(len(tensors))]

    def statistics(self) -> dict[int, LayerStatistics]:
        """The statistics of the layers that are done."""
        files = [self._statistics_file(i) for i in range(self.done)]
        return {
            i: layer
            for file in files
            if file.exists()
            for i, layer in Statistics.load(file).layers.items()
        }

    def plans(self) -> dict[int, LayerPlan]:
        """The plans of the layers that are done, as far as they were made on the way."""
        files = [self._plan_file(i) for i in range(self.done)]
        return {
            i: layer
            for file in files
            if file.exists()
            for i, layer in Plan.load(file).layers.items()
        }

    def clear(self) -> None:
        """Forget everything: the folder that holds this one goes."""
        if distributed.rank() == 0:
            shutil.rmtree(self.folder.parent, ignore_errors=True)
        distributed.barrier()
        self.done, self.state, self.files = 0, {}, {}

    def finish(self) -> None:
        """The work is complete: forget the progress, the state first so that none looks whole."""
        self._state_file.unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _keep(self, path: Path) -> None:
        """The next state names this file."""
        sync(path)
        self.files[path.name] = digest_of(path)

    def _found(self) -> dict[str, Any]:
        """What stands in the state file, if that is of the same work."""
        nothing: dict[str, Any] = {"done": 0}
        if not self._state_file.exists():
            return nothing
        try:
            found = json.loads(self._state_file.read_text())
            other = found["fingerprint"]
        except (ValueError, KeyError, TypeError):
            log.warning("%s can't be read: starting anew.", self._state_file)
            return nothing
        return nothing if self._differs(other) else found

    def _is_whole(self, files: dict[str, str]) -> bool:
        """Whether what is gone on from is as it was written; a layer further may be half done."""
        needed = [self._hidden_file(self.done)]
        for index in range(self.done):
            needed += [self._statistics_file(index), self._plan_file(index)]
        for path in needed:
            written = files.get(path.name)
            if written and not (path.exists() and digest_of(path) == written):
                log.warning("%s is not as it was written: starting anew.", path)
                return False
        return True

    def _differs(self, other: dict[str, Any]) -> bool:
        keys = sorted(other.keys() | self.fingerprint.keys())
        differences = {
            key: f"{key}: {other.get(key)} there, {self.fingerprint.get(key)} here"
            for key in keys
            if other.get(key) != self.fingerprint.get(key)
        }
        told = "; ".join(differences.values())
        if differences.keys() - COMPUTED_BY:
            raise CameraError(
                f"{self.folder.parent} holds unfinished work of other settings ({told}): delete it "
                "to start anew, or choose another folder."
            )
        if differences:
            log.warning("%s: starting anew (%s).", self.folder.parent.name, told)
        return bool(differences)

    @property
    def _state_file(self) -> Path:
        return self.folder / f"state{self._rank}.json"

    def _hidden_file(self, done: int) -> Path:
        return self.folder / f"hidden-{done:05d}{self._rank}.safetensors"

    def _statistics_file(self, index: int) -> Path:
        return self.folder / f"statistics-{index:05d}.safetensors"

    def _plan_file(self, index: int) -> Path:
        return self.folder / f"plan-{index:05d}.safetensors"


def code_version(*more: Path) -> str:
    """sha256 of this package's source (and `more`): another version could go on to other bytes."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parents[1].rglob("*.py")), *more]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
