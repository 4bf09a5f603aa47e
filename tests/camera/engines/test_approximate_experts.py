"""vLLM's `approximate_experts`: names, numbers and constants as its loader reads them."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from camera.inspection import description
from camera.pruning.plan import ReplacedExperts
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.checkpoints import config_of, tensors_of
from tests.helpers.constants import replace_by_constants

IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def replaced(checkpoints, tmp_path):
    """replaced(family): a model of two layers, and its checkpoint with constants in the last."""

    def go(family):
        source = checkpoints(family, num_hidden_layers=2)
        budget, layers = MetaModel(source).budget, {}
        draw = torch.Generator().manual_seed(0)
        for index, pool in budget.layers.items():
            keep_E = torch.ones(sum(pool.routed), dtype=torch.bool)
            keep_E[[1, 3] if index == 1 else []] = False
            constants_RH = torch.randn(int((~keep_E).sum()), budget.hidden, generator=draw)
            layers[index] = ReplacedExperts(keep_E, constants_RH)
        settings = dict(sparsity=0.5, sparsity_of="routed", replaced_by="mean")
        plan = camera.Plan("mone", settings, layers=layers)
        camera.apply(source, plan, tmp_path / "out", device="cpu", progress=False)
        return source, tmp_path / "out"

    return go


def read(folder):
    """Constants and other tensors of an export, as vLLM tells them apart."""
    constants, rest = {}, {}
    for name, tensor in tensors_of(folder).items():
        if name.endswith(".approx_value"):
            path, _, expert = name.removesuffix(".approx_value").rpartition(".")
            (layer,) = [int(part) for part in path.split(".") if part.isdigit()]
            constants.setdefault(layer, {})[int(expert)] = tensor
        else:
            rest[name] = tensor
    return constants, rest


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
@torch.no_grad()
def test_an_engine_reads_the_experts_that_stay_and_the_constants(family, replaced, tmp_path):
    source, folder = replaced(family)
    out = camera.export(folder, tmp_path / "export", format="approximate-experts")
    config, original = config_of(out), config_of(source)
    constants, rest = read(out)
    assert constants.keys() == {1}  # all experts of the first MoE layer stay
    told = {int(layer): experts for layer, experts in config["approximate_experts"].items()}
    assert told == {layer: sorted(found) for layer, found in constants.items()}
    assert "quantization_config" not in config
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "model_type"):
        assert config.get(key) == original.get(key)
    theirs, gone = tensors_of(source), set()
    for name, tensor in theirs.items():
        place = re.search(r"layers\.(\d+)\..*\.experts\.(\d+)\.", name)
        if place and int(place[2]) in told.get(int(place[1]), ()):
            gone.add(name)
        else:
            assert torch.equal(rest[name], tensor), name
    assert rest.keys() == theirs.keys() - gone and gone
    model = AutoModelForCausalLM.from_pretrained(source)
    layers = {i: (told[i], torch.stack([constants[i][e] for e in told[i]])) for i in told}
    want = replace_by_constants(model, layers)(IDS).logits
    loaded = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    torch.testing.assert_close(loaded, want, rtol=1e-4, atol=1e-4)


def test_no_other_program_is_given_what_it_would_misread(replaced, tmp_path):
    _, folder = replaced("qwen2_moe")
    for options in ({}, dict(format="gguf"), dict(format="compressed-tensors")):
        with pytest.raises(CameraError, match="replaced by constants"):
            camera.export(folder, tmp_path / "other", **options)
    out = camera.export(folder, tmp_path / "export", format="approximate-experts")
    with pytest.raises(RuntimeError, match="mismatch"):  # transformers has no constants
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(CameraError):
        camera.describe(out)
    said = description(out)
    assert said.compressed == "2 of its experts are constants, in vLLM's format"
    assert said.engines.pop("vLLM") == "as it is" and said.of_original
    assert all(how.startswith("no: ") for how in said.engines.values())
    assert not (tmp_path / "other").exists()


def test_what_has_no_constants_or_no_names_of_experts_is_refused(checkpoints, replaced, tmp_path):
    with pytest.raises(CameraError, match="no experts that are replaced by constants"):
        camera.export(checkpoints("llama"), tmp_path / "export", format="approximate-experts")
    _, folder = replaced("granitemoe")
    with pytest.raises(CameraError, match=r"in one tensor .*names one for each expert"):
        camera.export(folder, tmp_path / "export", format="approximate-experts")
    assert not (tmp_path / "export").exists()
    assert camera.describe(folder).engines["vLLM"].startswith("no: ")
