"""`camera wandb OUTPUT`: what is finished goes to W&B, once, also what ran without a tracker."""

import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.commands import upload
from experiments.commands.subcommands import main
from experiments.runs import wandb_files
from tests.helpers.runs.composing import command, tiny
from tests.helpers.runs.offline_wandb import read_back
from tests.helpers.runs.run_folders import add


@pytest.fixture(scope="module")
def untracked(checkpoints, data_folder, tmp_path_factory) -> Path:
    """The output of a sweep without a tracker: two finished runs and one that failed."""
    output = tmp_path_factory.mktemp("untracked")
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, output)
    grid = "hydra.sweeper.grids.main=[{method:dense},{method:camera_p,sparsity:0.4}]"
    assert command(*overrides, "experiment=main", grid, "evaluation.perplexity=[c4]") == 0
    add(output, "failed", "camera_p", 0.3, error="no text.")
    return output


@pytest.fixture(scope="module")
def kept(untracked, tmp_path_factory):
    """That output after `camera wandb` with WANDB_MODE=offline."""
    output = tmp_path_factory.mktemp("kept") / "outputs"
    shutil.copytree(untracked, output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert main(["wandb", str(output)]) == 0
    return output


def test_runs_without_a_tracker_are_told_from_their_files(kept):
    found = {}
    for folder in (kept / "runs").iterdir():
        found |= {run.run.display_name: run for run in read_back(folder)}
    assert set(found) == {"dense", "camera_p-40"}
    run = found["camera_p-40"]
    assert run.exit == 0 and run.run.run_group.startswith("main-")
    assert list(run.curve("layer/kept_share")) == list(run.curve("layer/seconds")) == [0, 1, 2]
    assert run.summary["perplexity/c4"] > 0 and run.config["bits"] is None
    assert "energy/histogram.values" in run.history and "log.txt" in run.files
    (sweep,) = (kept / "sweeps").iterdir()
    (told,) = read_back(sweep)
    assert told.run.job_type == "sweep" and told.run.run_group == run.run.run_group
    assert len(told.table("tables/paper")) == 2


def test_a_second_time_nothing_is_told_twice(kept, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = sorted(kept.rglob("offline-run-*"))
    assert main(["wandb", str(kept)]) == 0
    assert capsys.readouterr().out == "1 not finished, 3 kept offline\n"
    assert sorted(kept.rglob("offline-run-*")) == before


def test_what_was_kept_offline_is_synced_once_and_superseded_attempts_never(
    kept, capsys, monkeypatch
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    synced, run = [], next(iter((kept / "runs").glob("*dense*")))
    dead = run / "wandb" / "offline-run-20200101_000000-dead"
    dead.mkdir()
    (dead / "run-dead.wandb").touch()
    dead.rename(dead.with_name(dead.name.replace(wandb_files.OFFLINE, wandb_files.SUPERSEDED)))

    def sync(arguments, **_):
        folder = Path(arguments[-1])
        synced.append(folder)
        (log,) = folder.glob("*.wandb")
        log.with_suffix(".wandb.synced").touch()  # as `wandb sync` marks it
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(upload.subprocess, "run", sync)
    assert main(["wandb", str(kept)]) == 0
    assert sorted(synced) == sorted(kept.rglob("offline-run-*")) and len(synced) == 3
    assert main(["wandb", str(kept)]) == 0
    assert len(synced) == 3
    assert capsys.readouterr().out.endswith("1 not finished, 3 uploaded before\n")


def test_a_sync_that_fails_is_one_sentence(tmp_path, monkeypatch, capsys):
    run = add(tmp_path, "a", "camera_p", 0.2)
    (run / "wandb" / "offline-run-1-a").mkdir(parents=True)
    said = subprocess.CompletedProcess([], 1, "", "wandb: not logged in\n")
    monkeypatch.setattr(upload.subprocess, "run", lambda *_, **__: said)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert main(["wandb", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "not logged in" in error and "wandb login" in error and error.count("\n") == 1


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main(["wandb", str(tmp_path)]) == 1
    assert "has no runs" in capsys.readouterr().err
