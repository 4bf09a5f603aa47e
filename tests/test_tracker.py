"""The offline W&B run is read back from its file: what it holds, and how it ended."""

import json
import struct
import time
from pathlib import Path

import pytest
from composing import settings_of, tiny
from wandb.proto.wandb_internal_pb2 import Record

from camera.errors import CameraError
from experiments import measurements
from experiments.folders import Folders
from experiments.run import run

BLOCK, HEADER = 32768, 7  # the file is a LevelDB log: blocks of chunks, each with a header
LAST_CHUNKS = (1, 4)


def records(file: Path) -> list[Record]:
    data, position, pending, found = file.read_bytes(), HEADER, b"", []
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + HEADER])
        pending += data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in LAST_CHUNKS:
            found.append(Record.FromString(pending))
            pending = b""
    return found


def whole(file: Path) -> list[Record]:
    """The records once the last one is there: W&B's own process writes them after `finish`."""
    for _ in range(300):
        found = records(file)
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{file} is never finished")


def read_back(folder: Path) -> dict:
    """Config, summary and logged values of a run's only W&B file, with its group and exit code."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    read = {"config": {}, "summary": {}, "history": {}}
    for record in whole(file):
        if record.HasField("run"):
            read["run"] = record.run
            for update in record.run.config.update:
                read["config"][update.key] = json.loads(update.value_json)
        for part in ("summary", "history"):
            changes = getattr(record, part)
            for item in changes.update if part == "summary" else changes.item:
                key = ".".join(item.nested_key) or item.key
                read[part][key] = json.loads(item.value_json)
        if record.HasField("exit"):
            read["exit"] = record.exit.exit_code
    return read


@pytest.fixture
def settings(checkpoints, data_folder, tmp_path):
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
    more = ("tracker=wandb", "tracker.tags=[study]", "evaluation.perplexity=[wikitext2]")
    return settings_of(*overrides, *more, "alpha=0.7")


def test_a_good_run_is_mirrored(settings):
    folder = run(settings, sweep="sweep-1")
    read, metrics = read_back(folder), json.loads((folder / "metrics.json").read_text())
    assert read["exit"] == 0
    assert read["run"].run_group == "sweep-1"
    assert read["run"].job_type == "camera_p"
    assert set(read["run"].tags) == {settings.model["name"], "camera_p", "study"}
    for key, value in settings.to_dict().items():
        assert read["config"][key] == value
    perplexity = metrics["perplexity"]["wikitext2"]
    assert read["history"]["perplexity-wikitext2/perplexity"] == pytest.approx(perplexity)
    assert read["summary"]["peak_memory_bytes"] == metrics["peak_memory_bytes"]
    assert "compress/seconds/compress" in read["history"]


def test_energies_are_histograms_and_figures_images(settings):
    history = read_back(run(settings))["history"]
    pool = 8 * 24 + 40  # eight routed experts and the shared one
    for layer in range(3):
        counts = history[f"energy/layer_{layer:02d}.values"]
        assert history[f"energy/layer_{layer:02d}._type"] == "histogram"
        assert len(history[f"energy/layer_{layer:02d}.bins"]) == len(counts) + 1
        assert sum(counts) + history[f"energy/zeros_{layer:02d}"] == pool
    for figure in ("energies", "widths"):
        assert history[f"figures/{figure}._type"] == "image-file"


def test_a_failed_run_is_closed_as_failed_and_the_next_one_is_its_own(settings, monkeypatch):
    def fail(*_, **__):
        raise CameraError("no text.")

    with monkeypatch.context() as patch:
        patch.setattr(measurements, "perplexity", fail)
        with pytest.raises(CameraError):
            run(settings)
    read = read_back(Folders.of(settings).run)
    assert read["exit"] == 1
    assert read["summary"]["error"] == "no text."


def test_wandb_is_quiet(settings, capfd):
    run(settings)
    assert "wandb" not in "".join(capfd.readouterr())
