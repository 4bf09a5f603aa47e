"""Models that other tools quantised are those that their plain weights make."""

import json
import logging

import huggingface_hub
import pytest
import torch

import camera
from camera.calibration.settings import Calibration
from camera.checkpoint.loading import load_model, require_finite
from camera.checkpoint.places import read_places
from camera.checkpoint.quantized import fp8, mxfp4
from camera.checkpoint.quantized.opening import weights_of
from camera.evaluation.placement import weight_bytes
from camera.runtime.errors import CameraError
from camera.streaming.settings import MemoryChoices
from camera.streaming.skeleton import MetaModel
from tests.helpers.checkpoints import changed, config_of, shards_of, tensors_of
from tests.helpers.quantization.quantized_sources import SOURCES

DOWN = "model.layers.1.mlp.experts.2.down_proj"


@pytest.mark.parametrize("name", SOURCES)
def test_a_quantised_source_is_read_as_its_plain_weights(pair, name):
    """All tensors; what `load_model` builds of them; the memory that they are said to take."""
    quantised, plain = pair(name)
    found = weights_of(quantised).read(lambda key: True)
    expected = tensors_of(plain)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    ids = torch.arange(3, 19)[None]
    logits = [load_model(folder, "cpu")(ids).logits for folder in (quantised, plain)]
    assert torch.equal(*logits)
    assert weight_bytes(quantised, "cpu") == weight_bytes(plain, "cpu")


def test_a_model_of_the_hub_is_unpacked_as_its_folder_is(pair, monkeypatch):
    """By no quantiser that a tool of its own brings: a revision of it, and the main branch."""
    asked, folder = [], pair("awq")[0]

    def snapshot_download(name, *, revision=None, **how):
        asked.append((name, revision, how.get("token")))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ids = torch.arange(3, 19)[None]
    expected = load_model(folder, "cpu")(ids).logits
    for options in ({}, {"revision": "v1", "token": "t"}):
        found = camera.load("own/quantised-moe", device="cpu", **options)
        assert torch.equal(found(ids).logits, expected)
    assert ("own/quantised-moe", "v1", "t") in asked


@pytest.mark.parametrize(("name", "experts"), [("fp8", "disk"), ("awq", "ram")])
def test_compressed_from_a_quantised_source_is_compressed_from_its_plain_weights(
    pair, name, experts, data_folder, tmp_path
):
    outs = []
    for folder in pair(name):
        outs.append(tmp_path / folder.name)
        camera.compress(
            folder, "camera_p", outs[-1], sparsity=0.25, data=str(data_folder), device="cpu",
            calibration=Calibration("wikitext2", 2, 32), progress=False,
            memory=MemoryChoices(experts=experts),
        )  # fmt: skip
    quantised, plain = outs
    assert config_of(quantised) == config_of(plain)
    assert shards_of(quantised) == shards_of(plain)


def test_what_is_native_again_says_nothing_of_a_quantisation(pair, data_folder, tmp_path):
    quantised, _ = pair("fp8_per_matrix")
    camera.compress(
        quantised, "frequency", tmp_path / "out", sparsity=0.25, data=str(data_folder),
        calibration=Calibration("wikitext2", 2, 32), device="cpu", progress=False,
    )  # fmt: skip
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert all(t.dtype.itemsize > 1 for t in tensors_of(tmp_path / "out").values())


def test_describe_counts_the_plain_model(pair):
    quantised, plain = (camera.describe(folder) for folder in pair("fp8"))
    assert quantised.bits == plain.bits
    assert quantised.bytes["dense"] < 0.75 * plain.bytes["dense"]  # on disk


def test_the_estimate_knows_what_unpacking_takes(pair):
    quantised, plain = (MetaModel(folder, "cpu") for folder in pair("fp8"))
    assert plain.unpacking == 0
    largest = max(t.numel() for t in tensors_of(pair("fp8")[0]).values() if t.element_size() == 1)
    assert largest < quantised.unpacking < 10 * largest


@pytest.mark.parametrize("shape", [(40, 56), (3, 40, 56)])
@pytest.mark.parametrize("kind", [torch.float32, torch.uint8, torch.float8_e8m0fnu])
def test_fp8_blocks_are_multiplied_by_their_scales(shape, kind):
    """One by one; and, where blocks divide the matrix, as transformers does."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    draw = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=draw).to(torch.float8_e4m3fn)
    for block in ((16, 24), (8, 28)):
        grid = (*shape[:-2], -(-40 // block[0]), -(-56 // block[1]))
        if kind == torch.float32:
            scales = torch.rand(grid, generator=draw)
        else:
            scales = torch.randint(120, 131, grid, generator=draw).to(torch.uint8).view(kind)
        number = scales if kind == torch.float32 else scales.view(torch.uint8).float()
        number = number if kind == torch.float32 else 2.0 ** (number - 127)
        found = fp8.dequantized(codes, scales, block, torch.bfloat16)
        expected = codes.float()
        for i in range(40):
            for j in range(56):
                expected[..., i, j] *= number[..., i // block[0], j // block[1]]
        assert torch.equal(found, expected.bfloat16())
        if block == (8, 28):
            theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
            assert torch.equal(found, theirs)


def test_mxfp4_blocks_are_unpacked(tmp_path):
    """A number at a time: code, half of the byte, power of two; all experts, and one of them."""
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 6, 2, 16), generator=draw).to(torch.uint8)
    scales = torch.randint(118, 131, (3, 6, 2), generator=draw).to(torch.uint8)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = torch.empty(3, 64, 6)
    for e in range(3):
        for r in range(6):
            for c in range(64):
                byte = int(blocks[e, r, c // 32, c % 32 // 2])
                code = byte >> 4 if c % 2 else byte & 15
                value = -table[code - 8] if code > 7 else table[code]
                expected[e, c, r] = value * 2.0 ** (int(scales[e, r, c // 32]) - 127)
    assert torch.equal(mxfp4.dequantized(blocks, scales, torch.float32), expected)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    told = {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    place = weights_of(tmp_path).places[name]
    assert place.shape == expected.shape
    one = read_places({"": place.rows(1, 1)})[""]
    assert torch.equal(one, expected[1:2].bfloat16())


@pytest.mark.parametrize("bits", [2, 8])
def test_gptq_of_other_bits(bits):
    from camera.checkpoint.quantized import gptq
    from tests.helpers.quantization.quantized_sources import gptq as write

    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    stored, plain = write(weight, torch.float16, bits)
    assert torch.equal(gptq.dequantized(stored, bits, 8, 1, torch.float16), plain)


def test_asymmetric_groups_of_compressed_tensors(pair, tmp_path):
    """Zero points, packed by that package itself along the other dimension."""
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    draw = torch.Generator().manual_seed(0)

    def shift(tensors):
        codes = torch.randint(-8, 8, (32, 48), generator=draw).to(torch.int8)
        zeros = torch.randint(-8, 8, (32, 6), generator=draw).to(torch.int8)
        scales = torch.rand(32, 6, generator=draw).bfloat16()
        expected.append(
            (codes.float() - zeros.float().repeat_interleave(8, 1))
            * scales.float().repeat_interleave(8, 1)
        )
        tensors[f"{DOWN}.weight_packed"] = packing.pack_to_int32(codes, 4)
        tensors[f"{DOWN}.weight_zero_point"] = packing.pack_to_int32(zeros, 4, packed_dim=0)
        tensors[f"{DOWN}.weight_scale"] = scales

    expected = []
    told = json.loads(json.dumps(SOURCES["compressed_int4"][1]))
    other = json.loads(json.dumps(told["config_groups"]["group_0"]))
    other["targets"], other["weights"]["symmetric"] = [rf"re:.*{DOWN[6:]}$"], False
    told["config_groups"] = {"group_1": other, **told["config_groups"]}
    folder = changed(pair("compressed_int4")[0], tmp_path / "m", shift, quantization_config=told)
    found = weights_of(folder).read(lambda key: DOWN in key)
    assert torch.equal(found[f"{DOWN}.weight"], expected[0].bfloat16())


@pytest.mark.parametrize(("form", "group"), [("nvfp4", 16), ("mxfp4", 32)])
def test_four_bit_floats_of_compressed_tensors(form, group):
    """By a table of the sixteen numbers; the scales are FP8 under a global one, or exponents."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from camera.checkpoint.quantized import compressed_tensors

    draw = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (6, 32), generator=draw).to(torch.uint8)
    exponents = torch.randint(120, 131, (6, 64 // group), generator=draw).to(torch.uint8)
    parts, scale = {"weight_packed": packed, "weight_scale": exponents}, 2.0 ** (exponents - 127.0)
    strategy = {"strategy": "group", "scale_dtype": "torch.uint8"}
    if form == "nvfp4":
        eighths = (torch.rand(6, 4, generator=draw) + 1).to(torch.float8_e4m3fn)
        parts = parts | {"weight_scale": eighths, "weight_global_scale": torch.tensor([4.0])}
        scale, strategy = eighths.float() / 4, {"strategy": "tensor_group"}
    args = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": group, **strategy}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(positive + [-number for number in positive])
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    expected = table[codes] * scale.repeat_interleave(group, 1)
    format = f"{form}-pack-quantized"
    found = compressed_tensors.dequantized(parts, scheme, format, (6, 64), torch.bfloat16)
    assert torch.equal(found, expected.bfloat16())


def without(end):
    def change(tensors):
        del tensors[DOWN + end]

    return change


def cut(end):
    def change(tensors):
        tensors[DOWN + end] = tensors[DOWN + end][..., :-1].contiguous()

    return change


REFUSED = {
    "fp8, no scale": ("fp8", without(".weight_scale_inv"), {}, r"weight' without '.*scale_inv'"),
    "fp8, scale cut": ("fp8", cut(".weight_scale_inv"), {}, r"in place of \[2, 2\]"),
    "fp8, no config": ("fp8", None, None, "is float8_e4m3fn, and config.json has no"),
    "fp8, blocks": ("fp8", None, {"weight_block_size": 7}, "weight_block_size=7, and only two"),
    "fp8, fp4": ("fp8", None, {"expert_dtype": "fp4"}, "expert_dtype='fp4', and only fp8"),
    "unknown": ("fp8", None, {"quant_method": "quip"}, "by 'quip', and only fp8, mxfp4"),
    "gptq, no zeros": ("gptq", without(".qzeros"), {}, r"qweight' without '.*qzeros'"),
    "gptq, no order": ("gptq", without(".g_idx"), {}, r"qweight' without '.*g_idx'"),
    "gptq, bits": ("gptq", None, {"bits": 3}, "bits=3, and only 2, 4, 8"),
    "gptq, marlin": ("gptq", None, {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
    "gptq, other bits": ("gptq", None, {"bits": 8}, "don't belong together"),
    "awq, no scales": ("awq", without(".scales"), {}, r"qweight' without '.*scales'"),
    "awq, gemv": ("awq", None, {"version": "gemv"}, "version='gemv', and only gemm"),
    "compressed, no scale": (
        "compressed_int4", without(".weight_scale"), {}, r"packed' without '.*weight_scale'",
    ),
    "compressed, sparse": ("compressed_int4", None, {"format": "marlin-24"}, "format='marlin-24'"),
    "compressed, no target": ("compressed_int4", None, {"config_groups": {}}, "no group of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_unpacked_is_refused(pair, case, tmp_path):
    """Whoever reads it: a layer at a time, or whole."""
    name, change, keys, sentence = REFUSED[case]
    told = None if keys is None else SOURCES[name][1] | keys
    folder = changed(pair(name)[0], tmp_path / "m", change, quantization_config=told)
    for read in (lambda: MetaModel(folder, "cpu"), lambda: load_model(folder, "cpu")):
        with pytest.raises(CameraError, match=sentence):
            read()


def test_parts_that_are_not_finite_are_found_before_a_run(pair, tmp_path):
    def spoil(tensors):
        tensors[f"{DOWN}.weight"].view(torch.uint8)[0, 0] = 0x7F  # the NaN of e4m3fn

    folder = changed(pair("fp8")[0], tmp_path / "m", spoil)
    with pytest.raises(CameraError, match=rf"'{DOWN}.weight' in .* holds NaN or inf"):
        require_finite(weights_of(folder))


def test_it_is_told_what_a_source_is_stored_as(pair, caplog):
    with caplog.at_level(logging.INFO, "camera"):
        MetaModel(pair("fp8")[0], "cpu")
    assert "is stored as fp8" in caplog.text and "unpacked to bfloat16" in caplog.text


def test_gpt_oss_is_compressed_from_its_mxfp4_experts(checkpoints, data_folder, tmp_path):
    """From one expert at a time, and from what `mxfp4.dequantized` makes of all of them."""
    sizes = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=32)
    source, draw = checkpoints("gpt_oss", **sizes), torch.Generator().manual_seed(0)
    stored, plain = {}, {}
    for key, tensor in tensors_of(source).items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            stored[key] = plain[key] = tensor.bfloat16()
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=draw)
        scales = torch.randint(121, 125, (experts, rows, columns // 32), generator=draw)
        parts = {f"{key}_blocks": blocks.to(torch.uint8), f"{key}_scales": scales.to(torch.uint8)}
        plain[key] = mxfp4.dequantized(*parts.values(), torch.bfloat16)
        stored |= parts
    outs = []
    for name, tensors, told in (
        ("mxfp4", stored, {"quant_method": "mxfp4"}),
        ("bf16", plain, None),
    ):
        keys = {"dtype": "bfloat16", "quantization_config": told}
        folder = changed(source, tmp_path / name, lambda _, found=tensors: found, **keys)
        outs.append(tmp_path / f"{name}-out")
        camera.compress(
            folder, "camera_p", outs[-1], sparsity=0.25, data=str(data_folder), device="cpu",
            calibration=Calibration("wikitext2", 2, 32), progress=False,
            memory=MemoryChoices(experts="disk"),
        )  # fmt: skip
    assert config_of(outs[0]) == config_of(outs[1])
    assert shards_of(outs[0]) == shards_of(outs[1])
