"""What a killed run leaves behind so that the next one goes on at the right layer.

A folder holds, after every finished layer: the state (JSON), the hidden states that the next layer
needs, the energies measured so far. The state file is replaced last: what it names is complete, and
whatever else lies there is ignored and overwritten.

Shapes: B samples of a batch, L tokens of a sample, H hidden.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from camera.energy import Energies, LayerEnergy
from camera.errors import CameraError
from camera.source import write_json

log = logging.getLogger("camera")
STATE = "state.json"


class Progress:
    """The state of an unfinished pass over the layers, in a folder of its own."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.done = 0  # layers
        self.measured: list[int] = []  # layers whose energies are kept
        self.state: dict[str, Any] = {}

    def restore(self) -> bool:
        """Read what an earlier run left; True if there is something to go on from.

        What another version of the code or another device left is dropped, with a warning. Raises
        CameraError, with the difference, if it was left by other settings.
        """
        path = self.folder / STATE
        if not path.exists():
            return False
        found = json.loads(path.read_text())
        if self._differs(found["fingerprint"]):
            self.clear()
            return False
        self.done, self.state = found["done"], found["state"]
        self.measured = found["measured"]
        log.info("%s: going on at layer %d.", self.folder.parent.name, self.done)
        return True

    def commit(
        self,
        done: int,
        state: dict[str, Any],
        hidden: list[torch.Tensor],
        energy: LayerEnergy | None = None,
    ) -> None:
        """Record that `done` layers are finished; `hidden` are the inputs of the next one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            if energy is not None:
                Energies({done - 1: energy}, {}).save(self._energy_file(done - 1))
                self.measured.append(done - 1)
            if hidden:
                tensors = {str(i): hidden_BLH for i, hidden_BLH in enumerate(hidden)}
                save_file(tensors, self._hidden_file(done))
            content = {"fingerprint": self.fingerprint, "done": done, "state": state}
            content["measured"] = self.measured
            write_json(self.folder / STATE, content)
        except (OSError, SafetensorError) as error:
            raise CameraError(
                f"can't write {self.folder} ({error}): free space on that disk, then run the same "
                "command again to go on from here."
            ) from error
        self._hidden_file(self.done).unlink(missing_ok=True)
        self.done, self.state = done, state

    def hidden(self) -> list[torch.Tensor]:
        """The inputs of the layer to go on with, a tensor [B, L, H] per batch."""
        tensors = load_file(self._hidden_file(self.done))
        return [tensors[str(i)] for i in range(len(tensors))]

    def energies(self) -> dict[int, LayerEnergy]:
        """The energies of the layers that are done."""
        files = [self._energy_file(i) for i in range(self.done)]
        return {
            i: layer
            for file in files
            if file.exists()
            for i, layer in Energies.load(file).layers.items()
        }

    def clear(self) -> None:
        """Forget everything: the folder that holds this one goes."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        self.done, self.state, self.measured = 0, {}, []

    def finish(self) -> None:
        """The work is complete: forget the progress, the state first so that none looks whole."""
        (self.folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _differs(self, other: dict[str, Any]) -> bool:
        keys = sorted(other.keys() | self.fingerprint.keys())
        differences = {
            key: f"{key}: {other.get(key)} there, {self.fingerprint.get(key)} here"
            for key in keys
            if other.get(key) != self.fingerprint.get(key)
        }
        told = "; ".join(differences.values())
        if differences.keys() - {"code", "device"}:
            raise CameraError(
                f"{self.folder.parent} holds unfinished work of other settings ({told}): delete it "
                "to start anew, or choose another folder."
            )
        if differences:
            log.warning("%s: starting anew (%s).", self.folder.parent.name, told)
        return bool(differences)

    def _hidden_file(self, done: int) -> Path:
        return self.folder / f"hidden-{done:05d}.safetensors"

    def _energy_file(self, index: int) -> Path:
        return self.folder / f"energy-{index:05d}.safetensors"


def code_version() -> str:
    """sha256 of this package's source: another version could go on to other bytes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
