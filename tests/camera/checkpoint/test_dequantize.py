"""Packed and factored models unpacked, and exported, compute what they computed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import baselines.factorization.d2_moe
import baselines.quantization.rtn  # noqa: F401 (registers the method)
import camera
from camera.checkpoint.formats.ragged import RaggedExperts
from camera.checkpoint.loading import load_model
from tests.helpers.models import FAMILIES

IDS = torch.arange(3, 40)[None]
CASES = [(family, "camera_q") for family in FAMILIES]
CASES += [("qwen2_moe", "rtn"), ("phimoe", "rtn"), ("deepseek", "d2_moe"), ("mixtral", "d2_moe")]


@pytest.fixture
def compressed(checkpoints, data_folder, calibration, tmp_path):
    def make(family, method):
        options = {
            "camera_q": dict(bits=None, group_size=16, ratios=[0.25, 0.5, 0.25]),
            "rtn": dict(bits=4.1, attn_bits=6, router_bits=8),
            "d2_moe": dict(sparsity=0.3, merge="mean"),
        }[method]
        camera.compress(
            checkpoints(family),
            method,
            tmp_path / "out",
            data=str(data_folder),
            calibration=calibration,
            device="cpu",
            progress=False,
            **options,
        )
        return tmp_path / "out"

    return make


@pytest.mark.parametrize(("family", "method"), CASES)
def test_nothing_changes_but_the_form(family, method, compressed, tmp_path):
    folder = compressed(family, method)
    with torch.no_grad():
        packed = load_model(folder, device="cpu")
        want = packed(IDS).logits
        plain = camera.dequantize(packed)
        torch.testing.assert_close(plain(IDS).logits, want, rtol=1e-4, atol=1e-5)
        assert {spec["form"] for spec in plain.config.quantization_config.modules.values()} <= {
            "ragged",
            "narrow",
        }
        plain.save_pretrained(tmp_path / "plain")
        again = load_model(tmp_path / "plain", device="cpu")
        torch.testing.assert_close(again(IDS).logits, want, rtol=1e-4, atol=1e-5)
        camera.export(folder, tmp_path / "native", width_multiple=1)
        native = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
        torch.testing.assert_close(native(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, RaggedExperts) for module in native.modules())
    assert not hasattr(native.config, "quantization_config")
