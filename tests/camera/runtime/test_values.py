"""Settings of another type are refused by key; numbers of other libraries are what they are."""

import numpy as np
import pytest
import torch

import camera
from camera.calibration.settings import Calibration
from camera.method import METHODS
from camera.runtime.errors import CameraError
from camera.runtime.values import seed_of


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        ("camera_p", {"sparsity": "0.4"}, r"sparsity='0\.4': give a number\."),
        ("camera_p", {"sparsity": None}, r"sparsity=None: give a number\."),
        ("camera_p", {"sparsity": 0.4, "alpha": "0.5"}, r"alpha='0\.5': give a number\."),
        ("camera_p", {"sparsity": 0.4, "min_width": "8"}, r"min_width='8': give a whole number\."),
        ("camera_p", {"sparsity": True}, r"sparsity=True: give a number\."),
        ("camera_q", {"bits": "2.5"}, r"bits='2\.5': give a number or null\."),
        ("camera_q", {"group_size": 8.5}, r"group_size=8\.5: give a whole number or null\."),
        ("camera_q", {"group_bits": 3}, r"group_bits=3: give a list, each a whole number or null"),
        ("gptq", {"sym": 1}, r"sym=1: give true or false\."),
        ("random", {"sparsity": 0.4, "seed": -1}, r"seed=-1: give a whole number of at least 0\."),
    ],
)
def test_a_setting_of_another_type_is_refused_by_key(method, settings, told):
    with pytest.raises(CameraError, match=told):
        METHODS[method](**settings)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25)])
def test_numbers_of_other_libraries_are_python_numbers(number):
    found = camera.CameraP(sparsity=number)
    assert found == camera.CameraP(sparsity=0.25) and type(found.sparsity) is float
    assert type(camera.CameraP(sparsity=0.25, min_width=np.int64(8)).min_width) is int
    assert camera.CameraQ(ratios=[np.float32(0.5), 0.5]).ratios == [0.5, 0.5]
    assert type(Calibration(samples=np.int64(6)).samples) is int
    assert type(seed_of(np.int64(7))) is int


@pytest.mark.parametrize("seed", [None, "7", True, -1, 1.5])
def test_a_seed_that_is_no_whole_number_is_refused(seed, checkpoints, data_folder, tmp_path):
    with pytest.raises(CameraError, match=r"seed=.*: give a whole number of at least 0\."):
        camera.compress(
            checkpoints("qwen3_moe"),
            "camera_p",
            tmp_path / "out",
            sparsity=0.25,
            data=str(data_folder),
            seed=seed,
        )


def test_tasks_refuse_such_a_seed():
    from camera.evaluation.tasks.evaluate import read_tasks

    with pytest.raises(CameraError, match="seed=-1: give a whole number"):
        read_tasks(["boolq"], data="hub", seed=-1)


@pytest.mark.parametrize("bits", [-1, 0, float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["rtn", "camera_q", "mc"])
def test_bits_are_positive_and_finite(method, bits, checkpoints):
    from camera.streaming.skeleton import MetaModel

    asked = METHODS[method](bits=bits)
    with pytest.raises(CameraError, match=f"bits={bits} must be a positive number"):
        asked.check(MetaModel(checkpoints("qwen3_moe")).budget)


def test_a_share_of_experts_out_of_reach_is_told_in_the_words_of_the_setting(checkpoints):
    from camera.streaming.skeleton import MetaModel

    budget = MetaModel(checkpoints("deepseek")).budget
    told = r"sparsity=0\.9 of 'moe' can't be met .* largest .* is 0\.5 \(5 of 8 experts per layer"
    with pytest.raises(CameraError, match=told):
        METHODS["reap"](sparsity=0.9).check(budget)
