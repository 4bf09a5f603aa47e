"""`camera clean`: what is listed, what is freed, what stays."""

import json

import pytest

from experiments.commands.clean import CHECKPOINTS, LEFTOVERS, STATISTICS, items_of, main
from experiments.records.files import OutputFolder, lock_of
from tests.helpers.runs.run_folders import add


@pytest.fixture
def output(tmp_path):
    """An output folder: a run with its checkpoint, another's remains, statistics."""
    run = add(tmp_path, "m-camera_p-40-aaaaaa-1111", "camera_p", 0.4)
    made = tmp_path / "checkpoints" / "m-camera_p-40-aaaaaa"
    (run / "compress.json").write_text(json.dumps({"checkpoint": str(made)}))
    for folder in (made, made.with_name("unknown"), made.with_name(".broken.partial")):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
    statistics = tmp_path / "statistics"
    (statistics / ".half").mkdir(parents=True)
    (statistics / "half.safetensors.lock").touch()
    (statistics / "whole.safetensors").write_bytes(b"x" * 10)
    return OutputFolder(tmp_path)


def names(output):
    return {kind: [item.path.name for item in items] for kind, items in items_of(output).items()}


ALL = {
    CHECKPOINTS: ["m-camera_p-40-aaaaaa"],
    STATISTICS: ["whole.safetensors"],
    LEFTOVERS: [".broken.partial", "unknown", ".half"],
}


def test_without_a_flag_all_is_listed_with_its_size_and_nothing_freed(output, capsys):
    before = sorted(output.folder.rglob("*"))
    assert main([str(output.folder)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for kind in ALL.values() for name in kind)
    assert "1.0 kB  checkpoints/m-camera_p-40-aaaaaa" in said and "leftovers: 3, 2.0 kB" in said
    assert "Nothing is freed without --checkpoints" in said
    assert sorted(output.folder.rglob("*")) == before and names(output) == ALL


@pytest.mark.parametrize("kind", ALL)
def test_what_is_named_is_freed_and_the_rest_stays(kind, output, capsys):
    assert main([str(output.folder), f"--{kind}"]) == 0
    assert "Freed " in capsys.readouterr().out
    assert names(output) == ALL | {kind: []}
    assert (output.folder / "runs" / "m-camera_p-40-aaaaaa-1111" / "metrics.json").exists()


@pytest.mark.parametrize(
    "held", ["checkpoints/m-camera_p-40-aaaaaa", "runs/m-camera_p-40-aaaaaa-1111"]
)
def test_what_a_running_process_holds_stays(held, output, capsys):
    flags = [f"--{kind}" for kind in ALL]
    with lock_of(output.folder / held):
        assert main([str(output.folder), *flags]) == 0
    assert "in use, left" in capsys.readouterr().out
    assert names(output) == {CHECKPOINTS: ALL[CHECKPOINTS], STATISTICS: [], LEFTOVERS: []}


def test_a_folder_that_is_no_output_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--checkpoints"]) == 1
    assert "has no runs" in capsys.readouterr().err
