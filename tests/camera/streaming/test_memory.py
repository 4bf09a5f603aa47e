"""Hidden states and experts on disk: the same bytes, and nothing left behind."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import camera
from camera.runtime.errors import CameraError
from camera.runtime.mapped import MappedTable, release_pages
from camera.streaming.settings import MemoryChoices
from tests.helpers.checkpoints import shards_of


@pytest.fixture
def run(checkpoints, data_folder, calibration, tmp_path):
    def go(name, memory=None, method="camera_p", **options):
        settings = dict(sparsity=0.3, calibration=calibration, device="cpu", progress=False)
        settings |= dict(data=str(data_folder), memory=memory)
        out = tmp_path / name
        return camera.compress(checkpoints("qwen2_moe"), method, out, **{**settings, **options})

    return go


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
@pytest.mark.parametrize("experts", ["ram", "disk"])
def test_hidden_states_on_disk_change_no_byte(experts, propagate, run, tmp_path):
    for hidden in ("ram", "disk"):
        run(hidden, MemoryChoices(hidden=hidden, experts=experts), propagate=propagate)
    assert shards_of(tmp_path / "ram") == shards_of(tmp_path / "disk")
    assert {path.name for path in tmp_path.iterdir()} == {"ram", "disk"}


def test_hidden_states_on_disk_are_all_on_disk(run, monkeypatch):
    tables = []
    original = MappedTable.__init__

    def counted(self, *args):
        original(self, *args)
        tables.append(self.on_disk)

    monkeypatch.setattr(MappedTable, "__init__", counted)
    run("out", MemoryChoices(hidden="disk"))
    assert len(tables) == 1 + 3 * 3 and all(tables)  # embedded, then 3 of each of 3 layers


def test_what_is_let_go_of_is_still_there(tmp_path):
    table = MappedTable(1000, 64, torch.float32, -1, tmp_path)
    rows_TH = torch.randn(1000, 64)
    table.write(0, rows_TH)
    view = table.read(10, 50)
    view[3] = 7.0
    release_pages(view)
    rows_TH[13] = 7.0
    assert torch.equal(table.read(0, 1000), rows_TH)
    plain = torch.ones(5)
    release_pages(plain)
    assert plain.sum() == 5


def test_a_choice_that_is_none_is_refused_by_key():
    for key in ("phi", "hidden", "experts"):
        with pytest.raises(CameraError, match=rf"memory\.{key}=some is none of auto"):
            MemoryChoices(**{key: "some"})


class Killed(BaseException):
    """As good as kill -9: nothing of the library handles it."""


def test_a_run_on_disk_goes_on_where_it_was_killed(run, tmp_path, monkeypatch):
    def kill(name):
        """Start a run, and kill it when the second layer's state is about to be in place."""
        original, states = os.replace, []

        def replace(source, path, **more):
            states.extend([path] * (Path(path).name == "state.json"))
            if len(states) == 2:
                raise Killed
            original(source, path, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(Killed):
                run(name, asked)

    asked = MemoryChoices(experts="disk", hidden="disk")
    run("whole", asked)
    kill("out")
    assert not (tmp_path / "out").exists()
    run("out", asked)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
    kill("other")
    with pytest.raises(CameraError, match=r"experts_on_disk: True there, False here"):
        run("other", MemoryChoices(experts="ram"))


def test_no_hidden_states_are_left_in_the_checkpoint(run, tmp_path):
    run("out", MemoryChoices(hidden="disk"))
    names = {key for path in (tmp_path / "out").glob("model-*") for key in load_file(path)}
    assert names and all(name.startswith(("model.", "lm_head")) for name in names)
