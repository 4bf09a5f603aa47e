"""Refits of experts that put nothing out, and of what overflows."""

import pytest
from safetensors.torch import load_file, save_file

import camera
from camera.runtime.errors import CameraError

DOWN = "model.layers.1.mlp.experts.{}.down_proj.weight"


@pytest.fixture
def changed(checkpoints, tmp_path):
    """changed(factor, holds): a checkpoint whose tensors with such names are scaled."""
    import shutil

    def make(factor, holds):
        folder = tmp_path / "model"
        shutil.copytree(checkpoints("qwen3_moe"), folder)
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            scaled = {k: t * factor if holds(k) else t for k, t in tensors.items()}
            save_file(scaled, file, {"format": "pt"})
        return folder

    return make


@pytest.fixture
def run(calibration, data_folder, tmp_path):
    def go(folder, method, **settings):
        options = dict(calibration=calibration, data=str(data_folder), device="cpu", progress=False)
        return camera.compress(folder, method, tmp_path / "out", **options, **settings)

    return go


def weights(folder):
    return {k: t for file in folder.glob("model-*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.parametrize("factor", [0.0, 1e-30])
@pytest.mark.parametrize("dead", [(2,), (0, 1, 2, 3, 4, 5, 6)])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("camera_plus", {"min_width": 4}),
        ("camera_p", {"min_width": 4, "compensate": "layer"}),
        ("camera_p", {"min_width": 4, "compensate": "expert"}),
        ("camera_plus", {}),
    ],
)
def test_an_expert_that_puts_nothing_out_is_left_as_it_is(
    method, settings, dead, factor, changed, run, tmp_path
):
    names = {DOWN.format(expert) for expert in dead}
    run(changed(factor, names.__contains__), method, sparsity=0.25, **settings)
    found = weights(tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert any(".layers.1.mlp.experts" in name for name in found)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("camera_p", {"sparsity": 0.25}),
        ("camera_plus", {"sparsity": 0.25}),
        ("heapr", {"sparsity": 0.25}),
        ("reap", {"sparsity": 0.25}),
        ("magnitude", {"sparsity": 0.25, "compensate": "layer"}),
        ("camera_q", {"bits": 4.5, "group_size": 8}),
        ("mc", {"bits": 4.5, "group_size": 8}),
        ("gptq", {"bits": 6.0, "group_size": 8}),
    ],
)
def test_what_overflows_is_refused_by_layer(method, settings, changed, run):
    folder = changed(1e22, lambda name: "up_proj" in name)
    with pytest.raises(CameraError, match=r"model\.layers\.0\.mlp\.experts.*too large to be sq"):
        run(folder, method, **settings)
