"""Exports in compressed-tensors' format: other readers get the weights of the checkpoint."""

import json
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from camera.checkpoint.loading import load_model
from camera.checkpoint.modules import dequantize
from camera.engines.compressed_tensors import require_packable
from camera.runtime.errors import CameraError
from tests.helpers.checkpoints import config_of, tensors_of
from tests.helpers.models import build_model, build_tokenizer

pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")

SIZES = dict(hidden_size=32, moe_intermediate_size=32, num_hidden_layers=2)
SHARED = dict(shared_expert_intermediate_size=64)


def quantised(
    tmp_path, dtype=torch.float16, method="rtn", family="qwen3_moe", sizes=SIZES, **settings
):
    build_model(family, dtype=dtype, **sizes).save_pretrained(tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "source")
    settings = {"bits": 5.0, "sym": True, "group_size": 16, **settings}
    out = tmp_path / "packed"
    camera.compress(tmp_path / "source", method, out, device="cpu", progress=False, **settings)
    return out


def decompressed(folder):
    """Weights by compressed-tensors' own decompressor, by their names on disk, in fp32."""
    import re

    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    groups = config_of(folder)["quantization_config"]["config_groups"].values()
    tensors, found = tensors_of(folder), {}
    for name in [key for key in tensors if key.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        (group,) = [
            g
            for g in groups
            if any(
                re.match(t[3:], module) if t.startswith("re:") else t == module
                for t in g["targets"]
            )
        ]
        state = {
            part: tensors[f"{module}.{part}"]
            for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
            if f"{module}.{part}" in tensors
        }
        scheme = QuantizationScheme(**{k: v for k, v in group.items() if v is not None})
        found[module] = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return found


def own_weights(folder):
    """{expert's projection on disk: dequantised weight}, from this package's own reading."""
    model = dequantize(load_model(folder, device="cpu", dtype="float32"))
    found = {}
    for path, module in model.named_modules():
        if path.endswith(".experts") and hasattr(module, "gate_up"):
            for e in range(module.num_experts):
                gate, up = module.gate_up(e).chunk(2)
                names = ("gate_proj", "up_proj", "down_proj")
                for name, weight in zip(names, (gate, up, module.down(e)), strict=True):
                    found[f"{path}.{e}.{name}"] = weight.detach()
    return found


@pytest.mark.parametrize("bits, sym", [(2, True), (3, True), (3, False), (4, False), (8, True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compressed_tensors_reads_the_same_weights(bits, dtype, sym, tmp_path):
    stored = bits + (1 if sym else 2)
    folder = quantised(tmp_path, dtype, bits=stored, sym=sym)
    out = camera.export(folder, tmp_path / "out", format="compressed-tensors")
    found, expected = decompressed(out), own_weights(folder)
    assert found.keys() == expected.keys() and len(found) == 2 * 8 * 3
    for name, weight in found.items():
        if dtype == torch.float16:  # its decompressor multiplies in the scale's dtype
            assert torch.equal(weight, expected[name].half()), name
        else:
            assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_transformers_reads_one_symmetric_scheme_to_the_bit(dtype, tmp_path):
    folder = quantised(tmp_path, dtype, scale_dtype=str(dtype).removeprefix("torch."))
    out = camera.export(folder, tmp_path / "out", format="compressed-tensors")
    plain = camera.export(folder, tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype).state_dict()
    assert theirs.keys() >= ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


def test_a_shared_expert_is_packed_too(tmp_path):
    folder = quantised(tmp_path, family="qwen2_moe", sizes=SIZES | SHARED)
    out = camera.export(folder, tmp_path / "out", format="compressed-tensors")
    packed = {name for name in tensors_of(out) if name.endswith("weight_packed")}
    assert any(".shared_expert.up_proj." in name for name in packed)


def test_a_group_as_long_as_the_shorter_rows_is_one_scheme(tmp_path):
    sizes = SIZES | dict(hidden_size=64)
    folder = quantised(tmp_path, sizes=sizes, group_size=32, bits=4.5)
    out = camera.export(folder, tmp_path / "out", format="compressed-tensors")
    found, expected = decompressed(out), own_weights(folder)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight.half()), name
    (group,) = config_of(out)["quantization_config"]["config_groups"].values()
    assert group["weights"]["group_size"] == 32


def test_bits_by_layer_are_a_scheme_for_each(tmp_path, data_folder, calibration, caplog):
    settings = dict(bits=6.5, data=str(data_folder), calibration=calibration, bit_widths=[3, 8])
    sizes = SIZES | SHARED
    folder = quantised(
        tmp_path, method="layerwise_bits", family="qwen2_moe", sizes=sizes, **settings
    )
    out = camera.export(folder, tmp_path / "out", format="compressed-tensors")
    assert "transformers 5.23 doesn't read experts of several bits" in caplog.text
    found, expected = decompressed(out), own_weights(folder)
    assert found.keys() > expected.keys() and len(expected) == 2 * 8 * 3
    for name, weight in expected.items():
        assert torch.equal(found[name], weight.half()), name
    told = config_of(out)["quantization_config"]["config_groups"].values()
    assert sorted(group["weights"]["num_bits"] for group in told) == [3, 8]


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(method="camera_q", bits=2.5, calibrated=True), "weights of several bits"),
        (
            dict(family="granitemoe", sizes=dict(intermediate_size=32)),
            "hold all experts of a layer in one",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused(settings, said, tmp_path, data_folder, calibration):
    if settings.pop("calibrated", False):
        settings |= dict(data=str(data_folder), calibration=calibration, sym=False)
    folder = quantised(tmp_path, **settings)
    with pytest.raises(CameraError, match=said):
        camera.export(folder, tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()


SPEC = dict(hidden=32, group_size=16, gate_up={"bits": [4]}, down={})
ONE_WIDTH = SPEC | dict(form="packed", widths=[16, 16])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, None),
        (dict(gate_up={"bits": [8]}), None),  # bits may differ by layer
        (dict(group_size=64, widths=[16, 16]), None),  # one scale a row
        (dict(widths=[16, 8], group_size=8), "its experts are 8 to 16 wide"),  # the same maximum
        (dict(widths=[32, 32]), "its experts are 16 to 32 wide"),
        (dict(down={"bits": [3]}), "weights of several bits"),
        (dict(gate_up={"bits": [1]}), "has 1 bits"),
        (dict(hidden=40), "rows of 40 aren't whole groups of 16"),
        (dict(form="ragged", hidden=None, gate_up=None), None),  # not quantised
        (dict(form="ragged", gate_up=None, widths=[16, 20]), "its experts are 16 to 20 wide"),
    ],
)
def test_what_specs_tell_decides_before_a_weight_is_read(other, said):
    shared = SPEC | dict(form="packed_mlp", widths=[64])  # of a width of its own
    modules = {
        "model.layers.0.mlp.experts": ONE_WIDTH,
        "model.layers.0.mlp.shared_expert": shared,
        "model.layers.1.mlp.experts": {k: v for k, v in (ONE_WIDTH | other).items() if v},
    }
    with pytest.raises(CameraError, match=said) if said else nullcontext():
        require_packable(modules, "qwen2_moe")


def test_the_schemes_stand_in_the_config(tmp_path):
    out = camera.export(quantised(tmp_path), tmp_path / "out", format="compressed-tensors")
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "compressed-tensors"
    (group,) = told["config_groups"].values()
    assert group["weights"]["num_bits"] == 4 and group["weights"]["group_size"] == 16
