"""A mirror of the hub is all that a machine without internet needs."""

import os
import subprocess
import sys
from random import Random

import pandas as pd
import pytest

from camera.calibration.corpora import CORPORA, read_jsonl
from camera.evaluation.tasks.definitions import hub_address
from camera.evaluation.tasks.names import NINE_TASKS
from experiments.commands import mirror
from experiments.config.location import CONF
from experiments.tables.names.datasets import data_name
from experiments.tiny_moe.held_out import held_out_rows
from experiments.tiny_moe.world import build_world
from tests.helpers.machine.without_network import TRIED

ROWS = 3
WITHOUT_NETWORK = [sys.executable, "tests/helpers/machine/without_network.py"]


@pytest.fixture
def mirrored(tmp_path, data_folder, monkeypatch):
    """What the mirror writes where the hub has little text and few rows."""
    world = build_world()
    tasks = {repr(hub_address(task)): task for task in NINE_TASKS}
    texts = {
        repr(address): data_folder / corpus.files[split]
        for corpus in CORPORA.values()
        for split, address in corpus.hub.items()
    }

    def download(address, _):
        if task := tasks.get(repr(address)):
            return held_out_rows(world, task, ROWS, Random(0))
        file = texts[repr(address)]
        if file.suffix == ".gz":
            return read_jsonl(file)
        return [{"text": line} for line in file.read_text().splitlines(keepends=True)]

    monkeypatch.setattr(mirror, "download", download)
    folder = tmp_path / "mirror"
    assert mirror.main([str(folder)]) == 0
    return folder


def without_network(*command: str) -> subprocess.CompletedProcess:
    """The command where no socket leads out, and no variable says so to any library."""
    said = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE")
    environment = {key: value for key, value in os.environ.items() if key not in said}
    return subprocess.run(
        [*WITHOUT_NETWORK, *command],
        cwd=CONF.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_mirror_has_the_names_of_the_public_data_until_a_file_is_anothers(mirrored):
    assert data_name(str(mirrored)) == "hub"
    (mirrored / "c4" / "notes.txt").write_text("no part of the layout")
    assert data_name(str(mirrored)) == "hub"
    (mirrored / "wikitext2" / "test.txt").write_text("my own text")
    assert data_name(str(mirrored)) == "mirror"


def test_every_part_of_a_run_works_without_network(checkpoints, mirrored, tmp_path):
    done = without_network(
        *("main.py", "-m", "method=dense,camera_p"),
        f"model.path={checkpoints('qwen2_moe')}",
        f"data={mirrored}",
        f"output={tmp_path / 'output'}",
        *("calibration=mixed", "calibration.samples=4", "calibration.length=48"),
        *("evaluation=paper", "evaluation.blocks=1", "evaluation.speed.batch_sizes=[1]"),
        *("evaluation.speed.prompt_length=8", "evaluation.speed.new_tokens=2"),
        "evaluation.speed.repeats=1",
    )
    assert done.returncode == 0, done.stderr
    assert TRIED not in done.stderr
    table = pd.read_csv(tmp_path / "output" / "table.csv")
    assert len(table) == 2
    assert table[["wikitext2", "c4", *NINE_TASKS, "average"]].notna().all(axis=None)
    assert table["decode_x"].notna().sum() == 1


def test_the_network_is_really_closed(tmp_path):
    script = tmp_path / "reach.py"
    script.write_text("import urllib.request\nurllib.request.urlopen('http://192.0.2.1/')\n")
    done = without_network(str(script))
    assert done.returncode != 0
    assert f"{TRIED} 192.0.2.1" in done.stderr
