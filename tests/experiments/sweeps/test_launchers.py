"""Jobs on a cluster: what the queue is asked for, and a job that it takes off and puts back."""

import importlib.util
import json
import os
import signal
import sys

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

import camera.pipeline.resume
import camera.streaming.streamer
from experiments.config.location import CONF
from tests.helpers.composing import command, tiny

SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


class Queue(BasicLauncher):
    """Stands for submitit's launcher, which isn't installed here: a job that gets the signal leaves
    by sys.exit, as submitit's handler does, and is run again from the start."""

    asked: dict = {}
    lives = 0

    def __init__(self, **asked):
        super().__init__()
        Queue.asked = asked

    def launch(self, job_overrides, initial_job_idx):
        before = signal.signal(signal.SIGUSR2, lambda *_: sys.exit(-1))
        try:
            while True:
                Queue.lives += 1
                try:
                    return super().launch(job_overrides, initial_job_idx)
                except SystemExit as left:
                    assert left.code == -1 and Queue.lives <= Queue.asked["max_num_timeout"]
        finally:
            signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def queue(monkeypatch):
    monkeypatch.setitem(Plugins.instance().class_name_to_class, SLURM, Queue)
    monkeypatch.setattr(Queue, "lives", 0)
    return Queue


@pytest.fixture
def overrides(checkpoints, data_folder, tmp_path):
    source = checkpoints("qwen2_moe", num_hidden_layers=5)
    return ["-m", *tiny(source, data_folder, tmp_path), "evaluation=none", "method=camera_p"]


def test_a_job_put_back_into_the_queue_goes_on_where_it_was(
    queue, overrides, tmp_path, monkeypatch
):
    original, written = camera.pipeline.resume.write_json, []
    load, loaded = camera.streaming.streamer.LayerStreamer.load_layer, []

    def time_is_up(*args):
        original(*args)
        written.append(1)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGUSR2)

    def counted(self, index):
        loaded.append((queue.lives, index))
        return load(self, index)

    monkeypatch.setattr("camera.pipeline.resume.write_json", time_is_up)
    monkeypatch.setattr("camera.streaming.streamer.LayerStreamer.load_layer", counted)
    assert command(*overrides, "hydra/launcher=slurm") == 0
    assert queue.lives == 2
    first = [index for life, index in loaded if life == 1]
    then = [index for life, index in loaded if life == 2]
    # the signal came when two layers were written
    assert first[:2] == [0, 1] and then == list(range(then[0], 5)) and 2 <= then[0] < 5
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "DONE").exists() and not (run / "error.txt").exists()
    (sweep,) = (tmp_path / "sweeps").iterdir()
    assert json.loads((sweep / "jobs" / "0000.json").read_text())["error"] is None


def test_the_queue_is_asked_for_what_the_command_says(queue, overrides, tmp_path):
    more = ("hydra.launcher.timeout_min=30", "hydra.launcher.partition=short")
    assert command(*overrides, "hydra/launcher=slurm", *more) == 0
    asked = queue.asked
    assert (asked["timeout_min"], asked["partition"]) == (30, "short")
    assert 0 < asked["signal_delay_s"] < 30 * 60 and asked["max_num_timeout"] > 0
    # submitit's files stand below the sweep's, and %j is left for SLURM to fill in
    assert str(asked["submitit_folder"]).startswith(str(tmp_path / "sweeps"))
    assert str(asked["submitit_folder"]).endswith("%j")


@pytest.mark.parametrize("launcher", ["slurm", "ray"])
def test_a_launcher_that_is_not_installed_is_named(launcher, overrides, capsys):
    plugin = {"slurm": "submitit"}.get(launcher, launcher)
    if importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher"):
        pytest.skip(f"{plugin} is installed")
    assert command(*overrides, f"hydra/launcher={launcher}") == 1
    said = "".join(capsys.readouterr())
    assert f"hydra_plugins.hydra_{plugin}_launcher" in said


@pytest.mark.parametrize("launcher", sorted(p.stem for p in (CONF / "hydra/launcher").glob("*")))
def test_every_launcher_says_how_to_install_it(launcher):
    first = (CONF / "hydra" / "launcher" / f"{launcher}.yaml").read_text().partition("\n\n")[0]
    extra = {"parallel": "joblib"}.get(launcher, launcher)
    assert f"pip install 'camera-moe[{extra}]'" in first
    assert f"\n{extra} = [" in (CONF.parent / "pyproject.toml").read_text()


def test_ray_gives_a_job_a_gpu():
    said = OmegaConf.load(CONF / "hydra" / "launcher" / "ray.yaml")
    assert said.ray.remote.num_gpus >= 1  # from a job that asks for none Ray hides them
