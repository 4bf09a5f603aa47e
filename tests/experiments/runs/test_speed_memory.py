"""Speed is measured with two models in memory: the second is refused before it is read."""

import pytest

from camera.evaluation import placement
from camera.runtime.errors import CameraError
from experiments.records.folders import Folders
from experiments.runs import measurements
from tests.helpers.runs.composing import settings_of, tiny


def test_a_dense_model_that_does_not_fit_beside_the_other_is_refused(
    checkpoints, data_folder, tmp_path, monkeypatch
):
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
    settings = settings_of(*overrides, "method=camera_p", "sparsity=0.4", "evaluation=speed")
    measure = measurements.measurements(settings, Folders.of(settings))["speed"]
    monkeypatch.setattr(placement, "free_memory", lambda device: 1000)
    monkeypatch.setattr(measurements, "load_model", lambda *arguments: pytest.fail("was read"))
    with pytest.raises(
        CameraError, match=r"beside the original .* 1.00 kB are free: set .*sizes=\[\]"
    ):
        measure(None, None)
