"""Bit plans as lists of types for llama-quantize, whose rules are written down once more here."""

import re

import pytest

import camera
from camera.__main__ import main
from camera.engines.gguf.tensor_types import fitting
from camera.method import Plan
from camera.runtime.errors import CameraError
from tests.helpers.models import build_model, build_tokenizer


def quantised(tmp_path, family, method, sizes, **settings):
    build_model(family, **sizes).save_pretrained(tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "source")
    out = tmp_path / "packed"
    camera.compress(tmp_path / "source", method, out, device="cpu", progress=False, **settings)
    return out


def type_of(lines, tensor):
    """As llama-quantize looks it up: the first expression that is found in the name."""
    for line in lines:
        pattern, kind = line.split("=")
        if re.search(pattern.lower(), tensor):
            return kind
    return None


def test_every_layer_gets_the_types_of_its_bits(tmp_path, data_folder, calibration, caplog):
    sizes = dict(hidden_size=32, moe_intermediate_size=256, num_hidden_layers=11)
    sizes |= dict(shared_expert_intermediate_size=64, num_experts=2, num_experts_per_tok=1)
    folder = quantised(
        tmp_path,
        "qwen2_moe",
        "layerwise_bits",
        sizes,
        bits=4.0,
        quantizer="rtn",
        data=str(data_folder),
        calibration=calibration,
    )
    assert main(["tensor-types", str(folder), str(tmp_path / "types.txt")]) == 0
    lines = (tmp_path / "types.txt").read_text().split()
    bits = Plan.load(folder).shared["bits"]
    whole = {2: "q2_k", 3: "q3_k", 4: "q4_k", 8: "q8_0"}
    small = {2: "q4_0", 3: "q4_0", 4: "q5_0", 8: "q8_0"}
    assert len(set(bits.values())) > 1
    for index in range(11):
        kind = whole[bits[str(index)]]
        assert type_of(lines, f"blk.{index}.ffn_down_exps.weight") == kind
        kind = small[bits[str(index)]]
        for tensor in ("ffn_gate_exps", "ffn_up_exps", "ffn_up_shexp", "ffn_down_shexp"):
            assert type_of(lines, f"blk.{index}.{tensor}.weight") == kind
        assert type_of(lines, f"blk.{index}.attn_q.weight") is None
        assert type_of(lines, f"blk.{index}.ffn_gate_inp.weight") is None
    assert "rows of 32 don't fit q" in caplog.text


def test_a_dense_model_and_equal_bits_have_their_types_too(tmp_path):
    sizes = dict(num_hidden_layers=2, intermediate_size=64, hidden_size=48)
    folder = quantised(tmp_path, "llama", "rtn", sizes, bits=4.7)
    camera.tensor_types(folder, tmp_path / "types.txt")
    lines = (tmp_path / "types.txt").read_text().split()
    assert type_of(lines, "blk.1.ffn_up.weight") == "f16"  # 48 columns are no whole block
    assert type_of(lines, "blk.1.ffn_down.weight") == "q5_0"
    assert type_of(lines, "blk.1.ffn_norm.weight") is None


@pytest.mark.parametrize(
    ("kind", "columns", "found"),
    [
        ("q2_k", 1408, "q4_0"),
        ("q3_k", 704, "q4_0"),
        ("q4_k", 1408, "q5_0"),
        ("q5_k", 32, "q5_1"),
        ("q6_k", 64, "q8_0"),
        ("q4_k", 1536, "q4_k"),
        ("q8_0", 96, "q8_0"),
        ("q8_0", 90, "f16"),
    ],
)
def test_rows_that_are_no_whole_blocks_take_another_type(kind, columns, found):
    assert fitting(kind, columns) == found


def test_what_llama_cpp_has_no_type_for_is_refused(tmp_path, data_folder, calibration):
    options = dict(data=str(data_folder), calibration=calibration, bits=4.5, group_size=8)
    folder = quantised(tmp_path, "olmoe", "mc", dict(num_hidden_layers=2), **options)
    with pytest.raises(CameraError, match=r"has 1, 2, 3 bits|has 2, 3 bits|has 1, 3 bits"):
        camera.tensor_types(folder, tmp_path / "types.txt")
    pruned = tmp_path / "pruned"
    camera.compress(
        tmp_path / "source", "random", pruned, sparsity=0.3, device="cpu", progress=False
    )
    with pytest.raises(CameraError, match="says no bits of layer 0: quantise the model first"):
        camera.tensor_types(pruned, tmp_path / "types.txt")
    assert not (tmp_path / "types.txt").exists()
