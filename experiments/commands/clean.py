"""What lies in an output folder besides results, and freeing it: `camera clean OUTPUT`.

Without a flag it only lists. What a running process holds is never touched, and nothing of runs/
(numbers, logs, figures) and sweeps/ is removed. A checkpoint that is gone is made again by the run
that needs it, statistics are gathered again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from camera.runtime.errors import CameraError
from experiments.config.location import add_output_folder
from experiments.records.failures import NoRunsError
from experiments.records.files import COMPRESSION, OutputFolder, RunFiles, is_locked
from experiments.records.outcome import size_of

CHECKPOINTS, STATISTICS, LEFTOVERS = "checkpoints", "statistics", "leftovers"
ABOUT = {
    CHECKPOINTS: "compressed models",
    STATISTICS: "what was gathered of original models, shared by runs",
    LEFTOVERS: "half-done work of runs that were broken off, checkpoints that no run goes by",
}


@dataclass(frozen=True)
class Item:
    """A file or folder that may be freed, the lock that who uses it holds, runs that need it."""

    path: Path
    lock: FileLock
    runs: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @property
    def is_used(self) -> bool:
        """Whether a running process holds it."""
        if any(map(is_locked, self.runs)):
            return True
        if not Path(self.lock.lock_file).exists():
            return False
        try:
            with self.lock.acquire(timeout=0):
                return False
        except Timeout:
            return True


def items_of(output: OutputFolder) -> dict[str, list[Item]]:
    """What may be freed of an output folder, by its kind."""
    found: dict[str, list[Item]] = {kind: [] for kind in ABOUT}
    runs = _runs_by_checkpoint(output)
    for path in _inside(output.checkpoint("")):
        name = path.name.removeprefix(".").removesuffix(".partial").removesuffix(".statistics")
        kind = CHECKPOINTS if path.is_dir() and path.name in runs else LEFTOVERS
        lock = output.lock(f"checkpoints-{name}")
        found[kind].append(Item(path, lock, tuple(runs.get(name, ()))))
    for path in _inside(output.statistics):
        if path.suffix == ".lock":
            continue
        name = path.name.removeprefix(".").removesuffix(".partial").removesuffix(".safetensors")
        kind = LEFTOVERS if path.name.startswith(".") else STATISTICS
        found[kind].append(Item(path, FileLock(path.with_name(f"{name}.safetensors.lock"))))
    return found


def _runs_by_checkpoint(output: OutputFolder) -> dict[str, list[Path]]:
    """The runs of the folder, finished or not, by the name of the checkpoint that they need."""
    found: dict[str, list[Path]] = {}
    for run in output.runs():
        made = (RunFiles(run).read_part(COMPRESSION) or {}).get("checkpoint")
        # before it is made its name is the beginning of the run's
        found.setdefault(Path(made).name if made else run.name.rpartition("-")[0], []).append(run)
    return found


def free(item: Item) -> int:
    """Remove it, and return its bytes; filelock.Timeout where a running process holds it."""
    if any(map(is_locked, item.runs)):
        raise Timeout(item.lock.lock_file)
    with item.lock.acquire(timeout=0):
        size = item.size
        if item.path.is_file():
            item.path.unlink()
        else:
            shutil.rmtree(item.path)
    return size


def clean(folder: Path, kinds: Sequence[str]) -> None:
    """List what may be freed and free what is of these kinds; CameraError without an output."""
    output = OutputFolder(folder)
    found = items_of(output)
    if not any(found.values()) and not (folder / "runs").is_dir():
        raise NoRunsError(folder)
    freed = 0
    for kind, items in found.items():
        total = sum(item.size for item in items)
        print(f"{kind}: {len(items)}, {size_of(total)}  ({ABOUT[kind]})")
        for item in items:
            size, state = size_of(item.size), ""
            if kind in kinds:
                try:
                    freed += free(item)
                    state = "freed"
                except Timeout:
                    state = "in use, left"
            elif item.is_used:
                state = "in use"
            print(f"  {size:>9}  {item.path.relative_to(folder)}  {state}".rstrip())
    if kinds:
        print(f"Freed {size_of(freed)}.")
    else:
        print(f"Nothing is freed without {', '.join(f'--{kind}' for kind in ABOUT)}.")


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="camera clean", description=__doc__)
    add_output_folder(parser, "the folder that was `output`", metavar="OUTPUT")
    for kind, about in ABOUT.items():
        parser.add_argument(f"--{kind}", action="store_true", help=f"free {about}")
    asked = parser.parse_args(arguments)
    try:
        clean(asked.folder, [kind for kind in ABOUT if getattr(asked, kind)])
    except CameraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
