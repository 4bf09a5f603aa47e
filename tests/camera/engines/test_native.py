"""Native exports: a layer in memory at a time, as small as their widths, read by other programs."""

import json
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import camera
from camera.runtime.errors import CameraError
from tests.helpers.checkpoints import config_of, tensors_of
from tests.helpers.models import build_model, build_tokenizer

IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(5))


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def cut(tmp_path, family, method="random", overrides=None, **settings):
    build_model(family, **(overrides or {})).save_pretrained(tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "source")
    out = tmp_path / "cut"
    settings = {"sparsity": 0.4} | settings
    camera.compress(tmp_path / "source", method, out, device="cpu", progress=False, **settings)
    return out


@pytest.mark.parametrize("family", ["deepseek", "deepseek_v2"])
def test_a_shared_expert_is_padded_to_the_next_whole_number_of_routed_widths(family, tmp_path):
    """Their shared expert is as wide as a number of routed ones, which is chosen anew."""
    folder = cut(tmp_path, family, overrides={"n_shared_experts": 4}, sparsity=0.3)
    out = camera.export(folder, tmp_path / "out", width_multiple=4)
    config, widths = config_of(out), config_of(folder)["quantization_config"]["modules"]
    routed = max(max(s["widths"]) for s in widths.values() if s["form"] == "ragged")
    shared = max(s["width"] for path, s in widths.items() if path.endswith("shared_experts"))
    assert config["moe_intermediate_size"] == -(-routed // 4) * 4
    assert config["n_shared_experts"] == -(-shared // config["moe_intermediate_size"])
    torch.testing.assert_close(logits(out), logits(folder), rtol=1e-5, atol=1e-5)


def test_the_size_is_said_before_and_is_that_of_the_files(tmp_path, caplog):
    folder = cut(tmp_path, "qwen2_moe")
    caplog.set_level(logging.INFO, "camera")
    out = camera.export(folder, tmp_path / "out")
    written = sum(tensor.numel() * 4 for tensor in tensors_of(out).values())
    assert f"{written / 1e6:.1f} MB; compressed" in caplog.text


@pytest.mark.parametrize("shape", ["uniform", "ragged"])
def test_a_native_checkpoint_weighs_what_its_parameters_do(shape, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 512}
    settings = {"method": "magnitude", "expert_widths": shape}
    folder = cut(tmp_path, "mixtral", overrides=sizes, **settings)
    folder = folder if shape == "uniform" else camera.export(folder, tmp_path / "out")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    weighs = sum(4 * parameter.numel() for parameter in model.parameters())
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert weighs <= written <= 1.01 * weighs


def test_an_export_that_is_not_smaller_is_warned_of(tmp_path, caplog):
    """One expert that keeps its whole width makes all of them as wide; codes are unpacked."""
    wide = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    folder = cut(tmp_path, "mixtral", overrides=wide, sparsity=0.02)
    camera.export(folder, tmp_path / "out")
    assert "expert_widths=uniform" in caplog.text
    caplog.clear()
    camera.compress(tmp_path / "source", "rtn", tmp_path / "packed", bits=4.25, device="cpu")
    camera.export(tmp_path / "packed", tmp_path / "unpacked")
    assert "compressed-tensors keeps them" in caplog.text and "uniform" not in caplog.text


def test_only_a_layer_is_read_at_a_time(tmp_path, monkeypatch):
    from camera.streaming.skeleton import MetaModel

    folder, held = cut(tmp_path, "qwen3_moe"), []
    load = MetaModel.load_layer

    def watched(self, index, *rest):
        held.append([i for i, layer in enumerate(self.layers) if not _empty(layer)])
        return load(self, index, *rest)

    monkeypatch.setattr(MetaModel, "load_layer", watched)
    camera.export(folder, tmp_path / "out")
    assert held == [[], [], []]


def _empty(layer):
    return all(tensor.is_meta for tensor in layer.state_dict().values())


@pytest.mark.parametrize(
    "family, key, value",
    [
        ("phimoe", "architectures", ["PhiMoEForCausalLM"]),
        ("deepseek_v3", "scoring_func", "sigmoid"),
    ],
)
def test_what_other_programs_read_stands_in_the_config(family, key, value, tmp_path):
    folder = cut(tmp_path, family)
    assert config_of(folder)[key] == value
    assert config_of(camera.export(folder, tmp_path / "out"))[key] == value


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    folder = cut(tmp_path, "qwen3_moe")
    monkeypatch.setattr("camera.checkpoint.shards.write_tensors", _full_disk)
    with pytest.raises(CameraError, match="free space"):
        camera.export(folder, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def _full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("format", ["onnx", "native"])
def test_formats_and_their_settings_are_checked(format, tmp_path):
    with pytest.raises(CameraError, match=r"is none of native, gguf|belong to format=gguf"):
        camera.export(tmp_path, tmp_path / "out", format=format, type="F16")


def test_what_is_not_an_export_of_ours_is_refused_by_its_report(tmp_path):
    folder = cut(tmp_path, "qwen3_moe")
    (folder / "camera.json").write_text(json.dumps([]))
    with pytest.raises(CameraError, match="no report of a compression"):
        camera.export(folder, tmp_path / "out")
