"""Reads what W&B kept offline: its file is a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from wandb.proto.wandb_internal_pb2 import Record, RunRecord

BLOCK, HEADER = 32768, 7  # the log's blocks of chunks, each chunk with a header
LAST_CHUNKS = (1, 4)


@dataclass
class Kept:
    """One W&B run: its settings, the last value of all it logged, its summary, how it ended."""

    folder: Path
    run: RunRecord = field(default_factory=RunRecord)
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, list[Path]] = field(default_factory=dict)
    exit: int | None = None

    def file(self, key: str) -> Path:
        """The file that was logged by that name."""
        return self.folder / "files" / self.history[f"{key}.path"]

    def table(self, name: str) -> pd.DataFrame:
        """A table that was logged."""
        stored = json.loads(self.file(name).read_text())
        return pd.DataFrame(stored["data"], columns=stored["columns"])


def read_back(folder: Path) -> list[Kept]:
    """The W&B runs below a run's folder, in the order in which they began."""
    runs = [_read(file) for file in folder.glob("wandb/offline-run-*/*.wandb")]
    return sorted(runs, key=lambda kept: kept.run.start_time.ToNanoseconds())


def _read(file: Path) -> Kept:
    kept = Kept(file.parent)
    for record in _whole(file):
        if record.HasField("run"):
            kept.run = record.run
            for update in record.run.config.update:
                kept.config[update.key] = json.loads(update.value_json)
        for item in record.history.item:
            kept.history[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for update in record.summary.update:
            kept.summary[".".join(update.nested_key) or update.key] = json.loads(update.value_json)
        if record.HasField("artifact"):
            contents = record.artifact.manifest.contents
            kept.artifacts[record.artifact.name] = [Path(entry.local_path) for entry in contents]
        if record.HasField("exit"):
            kept.exit = record.exit.exit_code
    return kept


def _whole(file: Path) -> list[Record]:
    """The records once the last one is there: W&B's own process writes them after `finish`."""
    for _ in range(300):
        found = _records(file)
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{file} is never finished")


def _records(file: Path) -> list[Record]:
    data, position, pending, found = file.read_bytes(), HEADER, b"", []
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if kind == 0 or position + HEADER + size > len(data):
            break  # not all of it is written yet
        pending += data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in LAST_CHUNKS:
            found.append(Record.FromString(pending))
            pending = b""
    return found
