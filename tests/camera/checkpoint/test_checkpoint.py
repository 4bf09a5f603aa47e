"""Compressed checkpoints: they load in plain transformers, or fail loudly without the package."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import baselines.micro_experts.random  # noqa: F401 (registers the method)
import camera
from camera.checkpoint.formats.ragged import RaggedExperts
from camera.checkpoint.loading import load_model, load_tokenizer
from camera.runtime.errors import CameraError
from tests.helpers.checkpoints import tensors_of
from tests.helpers.models import FAMILIES, build_model, build_tokenizer

IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(5))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def compressed(checkpoints, tmp_path_factory):
    """compressed(family): folder of a randomly pruned model, and what compressing reported."""
    root, made = tmp_path_factory.mktemp("compressed"), {}

    def get(family):
        if family not in made:
            out = root / family
            result = camera.compress(
                checkpoints(family), "random", out, sparsity=0.45, device="cpu", progress=False
            )
            made[family] = out, result
        return made[family]

    return get


def masked(folder, result, source):
    """The original model with every removed micro-expert's down column set to zero."""
    model = AutoModelForCausalLM.from_pretrained(source)
    small = AutoModelForCausalLM.from_pretrained(folder)
    for path in result.widths:
        full, cut = model.get_submodule(path), small.get_submodule(path)
        with torch.no_grad():
            if isinstance(cut, RaggedExperts):
                for e, down in enumerate(full.down_proj):
                    kept = (down.T[:, None] == cut.down(e).T[None]).all(-1).any(1)
                    down[:, ~kept] = 0
            else:
                down = full.down_proj.weight
                kept = (down.T[:, None] == cut.down_proj.weight.T[None]).all(-1).any(1)
                down[:, ~kept] = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_equals_masking(family, compressed, checkpoints):
    folder, result = compressed(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(masked(folder, result, checkpoints(family)))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_generates_and_saves_again(family, compressed, tmp_path):
    folder, _ = compressed(family)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 21)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    assert torch.equal(again.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), out)


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_with_device_map_auto(family, compressed):
    folder, _ = compressed(family)
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    here = logits(plain, IDS.to(plain.device))
    torch.testing.assert_close(
        logits(spread, IDS.to(spread.device)).cpu(), here, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_files_shrink_as_reported(family, compressed, checkpoints):
    folder, result = compressed(family)
    before = sum(p.stat().st_size for p in checkpoints(family).glob("*.safetensors"))
    after = sum(p.stat().st_size for p in folder.glob("model-*.safetensors"))
    assert result.bytes == {"dense": before, "compressed": after}
    tensors = AutoModelForCausalLM.from_pretrained(folder)
    source = AutoModelForCausalLM.from_pretrained(checkpoints(family))
    parameters = [sum(p.numel() for p in m.parameters()) for m in (source, tensors)]
    realised = 1 - parameters[1] / parameters[0]
    assert result.sparsity["model"] == pytest.approx(realised, abs=1e-3)
    assert 0.40 < result.sparsity["moe"] <= 0.45


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_to_a_plain_native_checkpoint(family, compressed, tmp_path):
    folder, _ = compressed(family)
    plain = camera.export(folder, tmp_path / "plain")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert not any(isinstance(m, RaggedExperts) for m in model.modules())
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    AutoTokenizer.from_pretrained(plain)


WITHOUT_THE_PACKAGE = """
import sys
from transformers import AutoModelForCausalLM
loaded = []
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        loaded.append(folder)
    except (RuntimeError, ValueError) as error:
        assert "size" in str(error) or "stack" in str(error) or "model type" in str(error), error
sys.exit("loaded: " + " ".join(loaded) if loaded else 0)
"""


def test_a_reader_without_the_package_fails_loudly_and_names_it(compressed):
    folders = [str(compressed(family)[0]) for family in FAMILIES]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *folders],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", "TRANSFORMERS_VERBOSITY": "warning"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Unknown quantization type, got camera-moe" in done.stderr


def test_the_format_is_read_by_its_earlier_name_too(compressed, tmp_path):
    folder = tmp_path / "earlier"
    shutil.copytree(compressed("mixtral")[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "camera"
    (folder / "config.json").write_text(json.dumps(config))
    known = logits(load_model(compressed("mixtral")[0], device="cpu"))
    for model in (AutoModelForCausalLM.from_pretrained(folder), load_model(folder, device="cpu")):
        assert torch.equal(logits(model), known)


def test_bf16_checkpoints_stay_bf16(checkpoints, tmp_path):
    source = checkpoints("qwen2_moe", dtype=torch.bfloat16)
    camera.compress(source, "random", tmp_path / "o", sparsity=0.3, device="cpu", progress=False)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    loaded = load_model(tmp_path / "o", device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}  # computed so on a CPU
    for name, tensor in stored.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float()), name


def test_what_a_family_keeps_in_fp32_stays_so(tmp_path):
    source = tmp_path / "source"
    model = build_model("deepseek_v3", dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    model.save_pretrained(source)
    camera.compress(source, "random", tmp_path / "o", sparsity=0.3, device="cpu", progress=False)
    kept = {
        name: tensor.dtype
        for path in (tmp_path / "o").glob("model-*")
        for name, tensor in load_file(path).items()
        if tensor.dtype != torch.bfloat16
    }
    assert set(kept.values()) == {torch.float32}
    assert all(name.endswith("e_score_correction_bias") for name in kept) and len(kept) == 2


def test_emptied_experts_keep_their_slot_and_add_nothing():
    experts = RaggedExperts(8, [0, 3], torch.nn.SiLU(), dtype=torch.float32)
    torch.nn.init.normal_(experts.gate_up_proj), torch.nn.init.normal_(experts.down_proj)
    x = torch.randn(5, 8)
    first = torch.zeros(5, 1, dtype=torch.long)
    with torch.no_grad():
        assert experts(x, first, torch.ones(5, 1)).eq(0).all()
        both = experts(x, torch.tensor([[0, 1]] * 5), torch.ones(5, 2))
        assert torch.equal(both, experts(x, first + 1, torch.ones(5, 1)))


def test_the_tokenizer_and_a_model_card_travel_along(compressed, checkpoints):
    folder, result = compressed("qwen2_moe")
    text = "the cat sees"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(
        checkpoints("qwen2_moe")
    )(text)
    card = (folder / "README.md").read_text()
    for part in ("random", "seed=1234", "0.45 of moe", f"{100 * result.sparsity['routed']:.2f} %"):
        assert part in card
    assert f'base_model: "{checkpoints("qwen2_moe").name}"' in card
    assert str(checkpoints("qwen2_moe").parent) not in card


def test_a_newer_format_is_refused(compressed, tmp_path):
    folder = tmp_path / "newer"
    shutil.copytree(compressed("mixtral")[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CameraError, match="format 99 is newer"):
        load_model(folder, device="cpu")


def test_export_refuses_what_is_not_compressed(checkpoints, tmp_path):
    with pytest.raises(CameraError, match="not a compressed checkpoint"):
        camera.export(checkpoints("mixtral"), tmp_path / "x")


def test_export_from_the_command_line(compressed, tmp_path, capsys, caplog):
    from camera.__main__ import main

    folder, _ = compressed("mixtral")
    assert main(["export", str(folder), str(tmp_path / "x")]) == 0
    assert "native, float32, every expert" in caplog.text and "original" in caplog.text
    assert main(["export", str(folder), str(tmp_path / "x")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_model_is_described_from_the_command_line(checkpoints, capsys):
    from camera.__main__ import main

    assert main(["describe", str(checkpoints("mixtral")), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model_type"] == "mixtral" and sum(said["parts"].values()) == said["parameters"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_export_stays_in_the_dtype_of_its_source(dtype, data_folder, calibration, tmp_path):
    source = tmp_path / "source"
    build_model("qwen3_moe", dtype=dtype).save_pretrained(source)
    build_tokenizer().save_pretrained(source)
    camera.compress(source, "random", tmp_path / "small", sparsity=0.4, device="cpu")
    camera.export(tmp_path / "small", tmp_path / "native")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")
    assert stored.dtype == dtype
    names = tensors_of(tmp_path / "native")
    assert {tensor.dtype for tensor in names.values()} == {dtype}
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in names


def test_a_folder_without_a_tokenizer_is_refused(checkpoints, tmp_path):
    """transformers makes an empty one of config.json."""
    shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    with pytest.raises(CameraError, match="bare has no tokenizer: copy the files"):
        load_tokenizer(tmp_path / "bare")


@pytest.mark.parametrize("method", ["reap", "frequency", "camera_p"])
def test_odd_widths_run_one_by_one(method, checkpoints, data_folder, calibration, tmp_path):
    """torch's grouped product takes rows of whole 16 bytes only."""
    folder = checkpoints("qwen3_moe", num_experts=7, moe_intermediate_size=13)
    ids = torch.tensor([[3, 4, 5]])
    assert load_model(folder, device="cpu")(ids).logits.isfinite().all()
    options = dict(data=str(data_folder), device="cpu", progress=False, calibration=calibration)
    camera.compress(folder, method, tmp_path / "out", sparsity=0.25, **options)
    assert load_model(tmp_path / "out", device="cpu")(ids).logits.isfinite().all()


def with_keys(source, folder, **keys):
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention", "kernels-community/x"])
def test_the_attention_kernel_is_this_machines_matter(
    kernel, key, checkpoints, data_folder, calibration, tmp_path
):
    plain = checkpoints("qwen3_moe")
    folder = with_keys(plain, tmp_path / "named", **{key: kernel})
    ids = torch.tensor([[3, 4, 5]])
    found, wanted = (load_model(path, device="cpu")(ids).logits for path in (folder, plain))
    assert torch.equal(found, wanted)
    options = dict(data=str(data_folder), device="cpu", progress=False, calibration=calibration)
    camera.compress(folder, "camera_p", tmp_path / "out", sparsity=0.25, **options)
    load_model(tmp_path / "out", device="cpu")


@pytest.mark.parametrize("method", ["camera_p", "reap"])
def test_switches_of_the_forward_pass_are_no_property_of_the_weights(
    method, checkpoints, data_folder, calibration, tmp_path
):
    switches = {"output_attentions": True, "output_hidden_states": True}
    folder = with_keys(checkpoints("qwen3_moe"), tmp_path / "all", **switches)
    options = dict(data=str(data_folder), device="cpu", progress=False, calibration=calibration)
    camera.compress(folder, method, tmp_path / "out", sparsity=0.25, **options)
    assert not load_model(tmp_path / "out", device="cpu").config.output_attentions


def test_a_config_that_cannot_be_written_is_refused_before_the_first_layer(
    checkpoints, data_folder, calibration, tmp_path, monkeypatch
):
    from transformers import Qwen3MoeConfig

    def refuse(self, folder):
        raise ValueError("tie_word_embeddings must be text")

    monkeypatch.setattr(Qwen3MoeConfig, "save_pretrained", refuse)
    options = dict(data=str(data_folder), device="cpu", progress=False, calibration=calibration)
    with pytest.raises(camera.CameraError, match=r"config.json can't be written.*must be text"):
        camera.compress(
            checkpoints("qwen3_moe"), "camera_p", tmp_path / "out", sparsity=0.25, **options
        )
    assert not list(tmp_path.glob("**/model-*"))


def test_an_export_below_the_home_folder_stays_in_its_dtype(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    build_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    options = dict(sparsity=0.4, device="cpu", progress=False)
    camera.compress("~/source", "magnitude", tmp_path / "small", **options)
    camera.export("~/small", tmp_path / "native")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")
    assert stored.dtype == torch.bfloat16


def test_an_older_folder_with_switches_of_the_forward_pass_is_exported(compressed, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(compressed("qwen3_moe")[0], folder)
    config = json.loads((folder / "config.json").read_text())
    switches = {"output_attentions": True, "output_hidden_states": True}
    (folder / "config.json").write_text(json.dumps(config | switches))
    plain = camera.export(folder, tmp_path / "plain")
    assert not json.loads((plain / "config.json").read_text()).get("output_attentions")
