"""A tracker that dies costs a warning, and neither the run nor the reason of a failure."""

import numpy as np
import pytest

from camera.runtime.errors import CameraError
from experiments.records.energy_summary import read_energies
from experiments.records.files import OutputFolder, SweepFiles
from experiments.records.folders import Folders
from experiments.runs import run as runs
from experiments.runs.run import run
from experiments.runs.tracker import CarefulTracker, NullTracker
from experiments.runs.wandb_tracker import WandbTracker
from experiments.sweeps import ending
from experiments.sweeps.ending import end_sweep
from experiments.sweeps.jobs import SweepJob
from tests.helpers.runs.composing import settings_of, tiny
from tests.helpers.runs.run_folders import add


@pytest.fixture
def settings(checkpoints, data_folder, tmp_path):
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
    return settings_of(*overrides, "evaluation=none")


def dying(monkeypatch, *methods):
    """Let the run have a tracker that dies in those methods; what it was told."""
    told = []

    def method(name):
        def tell(*_, **__):
            told.append(name)
            if name in methods:
                raise ConnectionError(f"lost in {name}")

        return tell

    names = [name for name in vars(NullTracker) if not name.startswith(("_", "keeps"))]
    tracker = type("Tracker", (NullTracker,), {n: staticmethod(method(n)) for n in names})
    tracker.keeps = True
    for module in (runs, ending):
        monkeypatch.setattr(module, "CarefulTracker", lambda _: CarefulTracker(tracker()))
    return told


TOLD = ("start", "log", "log_layer", "log_histograms", "log_figures", "finish")


@pytest.mark.parametrize("name", TOLD)
def test_a_dead_tracker_is_one_warning(name, settings, monkeypatch, caplog):
    told = dying(monkeypatch, name)
    folder = run(settings)
    assert (folder / "DONE").exists() and not (folder / "error.txt").exists()
    assert caplog.text.count("is lost (ConnectionError: lost in") == 1
    assert told[-1] == name  # it is left in peace afterwards


def test_a_tracker_that_dies_at_the_end_of_a_sweep_is_one_warning(monkeypatch, tmp_path, caplog):
    told = dying(monkeypatch, "log_tables")
    add(tmp_path, "dense", "dense")
    sweep = SweepFiles(tmp_path / "sweeps" / "1")
    ends = [(SweepJob([], []), {"folder": str(tmp_path / "runs" / "dense"), "error": None})]
    asked = {"_target_": "experiments.runs.wandb_tracker.WandbTracker"}
    assert end_sweep(sweep, OutputFolder(tmp_path), ends, asked)
    assert caplog.text.count("is lost (ConnectionError: lost in log_tables)") == 1
    assert told == ["start", "log_tables"] and sweep.table.exists()


def test_a_tracker_that_dies_in_fail_keeps_the_reason(settings, monkeypatch):
    dying(monkeypatch, "fail")
    monkeypatch.setattr(runs, "assemble", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(settings)
    assert Folders.of(settings).files.error.read_text().startswith("ZeroDivisionError")


def test_a_refusal_at_the_start_is_the_users_to_mend(settings, monkeypatch):
    def refuse(*_, **__):
        raise CameraError("run `wandb login`.")

    monkeypatch.setattr(NullTracker, "start", refuse)
    with pytest.raises(CameraError, match="wandb login"):
        run(settings)


def test_figures_that_can_not_be_drawn_fail_no_run(settings, monkeypatch, caplog):
    def no_font(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(runs, "draw_run", no_font)
    folder = run(settings)
    assert "no figures: RuntimeError: no font" in caplog.text
    assert (folder / "DONE").exists()
    assert np.isfinite(read_energies(folder).histograms[0].edges).all()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"project": "team/moe"}, "tracker.project=team/moe"),
        ({"project": ""}, "tracker.project= "),
        ({"project": "p" * 129}, "at most 128"),
        ({"entity": "a/b"}, "tracker.entity=a/b"),
        ({"tags": ["study", ""]}, "tracker.tags"),
    ],
)
def test_what_wandb_would_refuse_is_refused_by_its_key(wrong, told):
    with pytest.raises(CameraError, match=told):
        WandbTracker(**wrong)


def test_a_wrong_tracker_is_refused_before_anything_is_done(settings, monkeypatch):
    monkeypatch.setattr(runs, "_measure", lambda *_: pytest.fail("it started"))
    wrong = {"_target_": "experiments.runs.wandb_tracker.WandbTracker", "project": "team/moe"}
    monkeypatch.setitem(settings.tracker, "_target_", wrong["_target_"])
    monkeypatch.setitem(settings.tracker, "project", "team/moe")
    with pytest.raises(CameraError, match=r"tracker\.project"):
        run(settings)
