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
class Artifact:
    """Files that W&B keeps under a name, by their paths within it."""

    type: str
    files: dict[str, Path]
    about: dict[str, Any]


@dataclass
class Kept:
    """One W&B run: its settings, the rows and the last value of all it logged, its summary, what
    it defined as the step of which names, the files it uploads, how it ended."""

    folder: Path
    run: RunRecord = field(default_factory=RunRecord)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    history: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    exit: int | None = None

    def curve(self, key: str) -> dict[int, float]:
        """A number by its layer."""
        return {row["layer"]: row[key] for row in self.rows if key in row}

    def file(self, key: str) -> Path:
        """The file that was logged by that name."""
        return self.folder / "files" / self.history[f"{key}.path"]

    def table(self, name: str) -> pd.DataFrame:
        """A table that was logged."""
        stored = json.loads(self.file(name).read_text())
        return pd.DataFrame(stored["data"], columns=stored["columns"])


def read_back(folder: Path) -> list[Kept]:
    """The W&B runs below a run's folder, in the order in which they began."""
    return _runs(folder, "offline-run-*")


def superseded(folder: Path) -> list[Kept]:
    """The attempts that another one went on from."""
    return _runs(folder, "superseded-run-*")


def _runs(folder: Path, names: str) -> list[Kept]:
    runs = [_read(file) for file in folder.glob(f"wandb/{names}/*.wandb")]
    return sorted(runs, key=lambda kept: kept.run.start_time.ToNanoseconds())


def _read(file: Path) -> Kept:
    kept = Kept(file.parent)
    for record in _whole(file):
        if record.HasField("run"):
            kept.run = record.run
            for update in record.run.config.update:
                kept.config[update.key] = json.loads(update.value_json)
        row = {
            ".".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        if row:
            kept.rows.append(row)
            kept.history |= row
        if record.metric.step_metric:
            kept.steps[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        kept.files |= {file.path for file in record.files.files}
        for update in record.summary.update:
            kept.summary[".".join(update.nested_key) or update.key] = json.loads(update.value_json)
        if record.HasField("artifact"):
            told = record.artifact
            files = {entry.path: Path(entry.local_path) for entry in told.manifest.contents}
            about = json.loads(told.metadata) if told.metadata else {}
            kept.artifacts[told.name] = Artifact(told.type, files, about)
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
