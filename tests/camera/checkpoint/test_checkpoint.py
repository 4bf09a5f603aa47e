"""Compressed checkpoints: they load in plain transformers, or fail loudly without the package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import baselines.micro_experts.random  # noqa: F401 (registers the method)
import camera
from camera.checkpoint.formats.ragged import RaggedExperts
from camera.checkpoint.loading import load_model
from camera.runtime.errors import CameraError
from tests.helpers.models import FAMILIES

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


def test_a_reader_without_the_package_fails_loudly(compressed):
    folders = [str(compressed(family)[0]) for family in FAMILIES]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *folders],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_bf16_checkpoints_stay_bf16(checkpoints, tmp_path):
    source = checkpoints("qwen2_moe", dtype=torch.bfloat16)
    camera.compress(source, "random", tmp_path / "o", sparsity=0.3, device="cpu", progress=False)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    loaded = load_model(tmp_path / "o", device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}  # computed so on a CPU
    for name, tensor in stored.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float()), name


def test_what_a_family_keeps_in_fp32_stays_so(checkpoints, tmp_path):
    source = checkpoints("deepseek_v3", dtype=torch.bfloat16)
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
    import shutil

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


def test_export_from_the_command_line(compressed, tmp_path, monkeypatch, capsys):
    from camera.__main__ import main

    folder, _ = compressed("mixtral")
    monkeypatch.setattr("sys.argv", ["camera", "export", str(folder), str(tmp_path / "x")])
    main()
    assert "native, uniform width" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists already"):
        main()
