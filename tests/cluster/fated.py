"""Camera-P as it fares on a cluster: what befalls a run is written down beforehand, by its ratio.

The folder that CLUSTER_FATES names holds fates.json ({"0.2": "kill"}), and tries.txt, one line for
each process that came as far as a layer: ratio, layer, rank.
"""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from camera.pruning.camera_p import CameraP

FOLDER = "CLUSTER_FATES"
LAYER = 1  # at which it happens: one is written by then
TOO_MUCH = 4 << 30
LONG_S = 600  # that nothing waits for: a time limit ends it, or the kernel
_tried: set[str] = set()


@dataclass(frozen=True)
class Fated(CameraP):
    """Camera-P, and its fate at the second layer."""

    def apply(self, index, ffn, plan, seen):
        meet_fate(str(self.sparsity), index)
        return super().apply(index, ffn, plan, seen)


def meet_fate(ratio: str, layer: int) -> None:
    """Note the try; what is written of this ratio happens at its layer."""
    folder, rank = Path(os.environ[FOLDER]), os.environ.get("RANK", "0")
    if ratio not in _tried:
        _tried.add(ratio)
        with (folder / "tries.txt").open("a") as tries:
            tries.write(f"{ratio} {layer} {rank}\n")
    if layer != LAYER:
        return
    match json.loads((folder / "fates.json").read_text()).get(ratio):
        case "fail":
            raise RuntimeError("its fate was to fail")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill rank 1":
            if rank == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(LONG_S)
        case "too much":
            held = bytearray(os.urandom(1 << 20)) * (TOO_MUCH >> 20)
            time.sleep(LONG_S)
            del held
        case "too long once":
            if sum(line.startswith(f"{ratio} ") for line in _lines(folder)) == 1:
                time.sleep(LONG_S)


def _lines(folder: Path) -> list[str]:
    return (folder / "tries.txt").read_text().splitlines()
