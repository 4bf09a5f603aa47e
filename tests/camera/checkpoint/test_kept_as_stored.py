"""What nobody changed of a quantised source stays as it was stored, and config.json says so."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from camera.checkpoint.loading import load_model
from camera.checkpoint.quantized.opening import weights_of
from camera.runtime.errors import CameraError
from tests.helpers.checkpoints import changed, config_of, tensors_of
from tests.helpers.quantization.quantized_sources import SOURCES

IDS = torch.arange(3, 19)[None]
EXPERTS = ".mlp.experts"


@pytest.fixture(scope="module")
def compressed(pair, tmp_path_factory):
    """compressed(tool, method, ...): the checkpoints of store=source and store=bfloat16."""
    made = {}

    def folders(name, method, **settings):
        key = name, method, *settings.items()
        if key not in made:
            made[key] = [tmp_path_factory.mktemp("kept") / s for s in ("source", "bfloat16")]
            for out in made[key]:
                options = dict(store=out.name, device="cpu", progress=False)
                camera.compress(pair(name)[0], method, out, **settings, **options)
        return made[key]

    return folders


def raw(tensors):
    return {key: (t.dtype, t.shape, t.flatten().view(torch.uint8)) for key, t in tensors.items()}


def are_equal(one, other):
    assert one.keys() == other.keys()
    for key, (dtype, shape, data) in one.items():
        assert (dtype, shape) == other[key][:2] and torch.equal(data, other[key][2]), key


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_not_compressed_is_the_source_s_byte_for_byte(compressed, pair, name):
    """Beside experts of Camera's format, and so for whoever unpacks it."""
    kept, plain = compressed(name, "magnitude", sparsity=0.25)
    source = raw(tensors_of(pair(name)[0]))
    pool = ".mlp." if name == "fp8" else EXPERTS  # deepseek_v3 has shared experts
    outside = {key: value for key, value in source.items() if pool not in key}
    found = {k: v for k, v in raw(tensors_of(kept)).items() if pool not in k}
    if name == "fp8":  # of which layer 0 is dense, all of its FFN pruned, and gates are plain
        outside, found = ({k: v for k, v in t.items() if "mlp" not in k} for t in (outside, found))
    are_equal(found, outside)
    are_equal(raw(weights_of(kept).read(lambda key: True)), raw(tensors_of(plain)))
    told = config_of(kept)["quantization_config"]
    assert told["source"]["quant_method"] == SOURCES[name][1]["quant_method"]
    assert "source" not in config_of(plain)["quantization_config"]
    expected = load_model(plain, "cpu")(IDS).logits
    assert torch.equal(load_model(kept, "cpu")(IDS).logits, expected)
    theirs = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
    assert torch.equal(theirs(IDS).logits, expected)


def test_what_was_loaded_is_saved_plain(compressed, tmp_path):
    kept, plain = compressed("gptq", "magnitude", sparsity=0.25)
    AutoModelForCausalLM.from_pretrained(kept).save_pretrained(tmp_path / "again")
    are_equal(raw(tensors_of(tmp_path / "again")), raw(tensors_of(plain)))
    assert "source" not in config_of(tmp_path / "again")["quantization_config"]


@pytest.mark.parametrize("name", ["fp8_per_matrix", "compressed_int4"])
def test_experts_that_stay_are_the_source_s(compressed, pair, name):
    """All that is left is packed, and config.json says of it what it said."""
    kept, plain = compressed(name, "aimer", sparsity=0.25)
    assert config_of(kept)["quantization_config"] == SOURCES[name][1]
    source, found = raw(tensors_of(pair(name)[0])), raw(tensors_of(kept))
    of_source = [value for key, value in source.items() if EXPERTS in key]
    experts = [value for key, value in found.items() if EXPERTS in key]
    assert len(experts) == len(of_source) * 3 // 4
    for dtype, shape, data in experts:
        assert any((dtype, shape) == x[:2] and torch.equal(data, x[2]) for x in of_source)
    are_equal(raw(weights_of(kept).read(lambda key: True)), raw(tensors_of(plain)))


def test_transformers_own_quantiser_loads_what_is_partly_packed(compressed):
    """Experts of one smaller width, which config.json names as not converted."""
    kept, plain = compressed("fp8_per_matrix", "magnitude", sparsity=0.25, expert_widths="uniform")
    told = config_of(kept)["quantization_config"]
    assert told["quant_method"] == "fp8"
    assert told["modules_to_not_convert"] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    packed = {key for key, (dtype, *_) in raw(tensors_of(kept)).items() if dtype.itemsize == 1}
    assert packed and not any("mlp" in key for key in packed)
    models = [AutoModelForCausalLM.from_pretrained(f).float() for f in (kept, plain)]
    logits = [model(IDS).logits for model in models]
    assert torch.allclose(*logits, atol=0.02)  # one is rounded to bfloat16 in between
    assert torch.equal(load_model(kept, "cpu")(IDS).logits, logits[1])


def test_rows_of_stacked_experts_stay_as_they_are_stored(checkpoints, tmp_path):
    """gpt-oss: of blocks and scales of all experts those of the experts that stay."""
    sizes = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=32)
    source, draw = checkpoints("gpt_oss", **sizes), torch.Generator().manual_seed(0)

    def pack(tensors):
        for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(key).shape
            shape = experts, rows, columns // 32, 16
            tensors[f"{key}_blocks"] = torch.randint(0, 256, shape, generator=draw).byte()
            scales = torch.randint(121, 125, shape[:-1], generator=draw)
            tensors[f"{key}_scales"] = scales.byte()

    told = {"quant_method": "mxfp4"}
    folder = changed(source, tmp_path / "m", pack, dtype="bfloat16", quantization_config=told)
    out = tmp_path / "out"
    camera.compress(folder, "aimer", out, sparsity=0.25, store="source", progress=False)
    assert config_of(out)["quantization_config"] == told
    plan = camera.Plan.load(out)
    before, found = tensors_of(folder), tensors_of(out)
    for layer in range(2):
        keep_E = plan.layers[layer].keep_E
        for name in ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks"):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            assert torch.equal(found[key], before[key][keep_E])


def test_what_can_t_be_said_in_a_native_config_is_refused(pair, tmp_path):
    settings = dict(sparsity=0.25, store="source", progress=False)
    with pytest.raises(CameraError, match="still stored as gptq: set store=bfloat16"):
        camera.compress(pair("gptq")[0], "aimer", tmp_path / "out", **settings)
    with pytest.raises(CameraError, match="store=int4 is none of bfloat16, source"):
        camera.compress(pair("gptq")[0], "aimer", tmp_path / "out", **settings | {"store": "int4"})
