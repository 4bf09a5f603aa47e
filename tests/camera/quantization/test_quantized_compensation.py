"""Down refitted to what the quantised gate and up give, before it is quantised itself.

Shapes: T tokens, H hidden.
"""

import pytest
import torch

import camera
from camera.calibration.hessians import HessianObserver
from camera.checkpoint.loading import load_model
from camera.compensation.settings import CompensationSettings
from camera.moe.capture import run_ffn
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.quantization.camera_q import CameraQ
from camera.quantization.layer import quantize_layer
from camera.quantization.plans.layer_bits import ExpertBits
from camera.quantization.quantizers.gptq import GPTQ
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.models import build_model
from tests.helpers.oracles import capture


def layer_of(family):
    """A layer's FFN, inputs to calibrate on, and others."""
    model = build_model(family).requires_grad_(False)
    ids = torch.randint(3, 250, (40, 64), generator=torch.Generator().manual_seed(0))
    x_TH, _ = capture(model, 1, ids)
    ffn = FeedForward(model.model.layers[1], family_of(family), "model.layers.1")
    return ffn, x_TH[: 32 * 64], x_TH[32 * 64 :]


def output(ffn, x_TH):
    with torch.no_grad():
        out = ffn.module(x_TH[None])
    return (out[0] if isinstance(out, tuple) else out).flatten(0, -2)


def lost(family, bits, compensation):
    """Share of the layer's squared output on new tokens that quantising costs, and the report."""
    ffn, x_TH, new_TH = layer_of(family)
    observer = HessianObserver(ffn, keep=10_000)
    with torch.no_grad():
        run_ffn(ffn, x_TH[None], observer)
    before_TH = output(ffn, new_TH)
    plan = [ExpertBits.matched(torch.full((width,), bits)) for width in ffn.widths]
    if bits == 3:  # and a quarter removed
        plan = [
            ExpertBits.matched(torch.tensor([0 if i % 4 == 0 else 3 for i in range(width)]))
            for width in ffn.widths
        ]
    _, report = quantize_layer(
        ffn,
        plan,
        GPTQ(group_size=16),
        observer.result(),
        true_sequential=True,
        compensation=compensation,
    )
    error_TH = output(ffn, new_TH) - before_TH
    return (error_TH.square().sum() / before_TH.square().sum()).item(), report


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_less_is_lost_on_other_tokens(family, bits):
    plain, _ = lost(family, bits, None)
    compensated, reports = lost(family, bits, CompensationSettings("expert"))
    assert compensated < plain
    for report in reports.values():
        assert 0 < report["missing"] < 1


def test_what_is_almost_exact_stays_so():
    plain, _ = lost("llama", 8, None)
    compensated, _ = lost("llama", 8, CompensationSettings("expert"))
    assert compensated < max(2 * plain, 1e-4)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_from_the_settings_to_a_model_that_runs(
    family, checkpoints, data_folder, calibration, tmp_path
):
    method = CameraQ(bits=2.9, group_size=16, true_sequential=True, compensate="expert")
    source = checkpoints(family)
    result = camera.compress(
        source,
        method,
        tmp_path / "out",
        calibration=calibration,
        data=str(data_folder),
        device="cpu",
        progress=False,
    )
    for layer in result.layers.values():
        assert all("missing" in module for module in layer["experts"].values())
    model = load_model(tmp_path / "out", "cpu", "float32")
    assert torch.isfinite(model(torch.arange(3, 40)[None]).logits).all()


@pytest.mark.parametrize(
    "options", [dict(compensate="expert"), dict(compensate="layer", true_sequential=True)], ids=str
)
def test_impossible_settings_are_refused(options, checkpoints):
    budget = MetaModel(checkpoints("llama")).budget
    with pytest.raises(CameraError, match="compensate="):
        CameraQ(bits=2.9, group_size=16, **options).check(budget)
