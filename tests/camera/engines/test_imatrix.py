"""Importance matrices, held against plain loops over the model in transformers.

Shapes: T tokens, N tokens of one expert, H hidden, E experts, K experts per token.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import camera
from camera.__main__ import main
from camera.calibration.tokens import calibration_tokens
from camera.engines.gguf.architectures import ARCHITECTURES
from camera.runtime.errors import CameraError
from tests.helpers.models import build_tokenizer
from tests.helpers.oracles import ffn_of, shared_of

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
CALIBRATION = camera.Calibration(source="wikitext2", samples=3, length=40)
ATTENTION = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_a_proj": "attn_q_a",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
}


def read(path):
    """(numbers and texts by key, arrays by name) of a GGUF file."""
    file = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in file.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in file.tensors}


@torch.no_grad()
def expected(source, data_folder):
    """{GGUF's name: (sum of x^2 [E, C], tokens [E])}, by hooks of the whole model."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.set_experts_implementation("eager")
    tokens = calibration_tokens(build_tokenizer(), CALIBRATION, data=str(data_folder), seed=1234)
    found = {}

    def add(name, x_NH, expert=0, experts=1):
        sums, counts = found.setdefault(
            name, (torch.zeros(experts, x_NH.shape[1], dtype=torch.float64), torch.zeros(experts))
        )
        sums[expert] += x_NH.double().square().sum(0)
        counts[expert] += len(x_NH)

    def watch(name, linear):
        linear.register_forward_pre_hook(lambda _, inputs: add(name, inputs[0].flatten(0, -2)))

    for index, layer in enumerate(model.model.layers):
        for name, module in layer.self_attn.named_modules():
            if isinstance(module, nn.Linear) and name in ATTENTION:
                watch(f"blk.{index}.{ATTENTION[name]}.weight", module)
        ffn = ffn_of(layer)
        sparse = hasattr(ffn, "experts")
        mlp = shared_of(ffn) if sparse else ffn
        for part in ("gate", "up", "down") if mlp is not None else ():
            suffix = "_shexp" if sparse else ""
            watch(f"blk.{index}.ffn_{part}{suffix}.weight", getattr(mlp, f"{part}_proj"))
        if not sparse:
            continue

        def experts(module, inputs, index=index):
            x_TH, index_TK, _ = inputs
            for e in range(len(module.down_proj)):
                x_NH = x_TH[(index_TK == e).any(1)]
                gate, up = F.linear(x_NH, module.gate_up_proj[e]).chunk(2, 1)
                h_NW, size = F.silu(gate) * up, len(module.down_proj)
                for part, x in (("gate", x_NH), ("up", x_NH), ("down", h_NW)):
                    add(f"blk.{index}.ffn_{part}_exps.weight", x, e, size)

        ffn.experts.register_forward_pre_hook(experts)
    for ids_1L in tokens.ids_NL.split(1):
        model.model(input_ids=ids_1L)
    return found


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_values_are_those_of_the_model_in_transformers(family, checkpoints, data_folder, tmp_path):
    source = checkpoints(family, num_hidden_layers=2)
    options = dict(calibration=CALIBRATION, data=str(data_folder), device="cpu", progress=False)
    fields, found = read(camera.imatrix(source, tmp_path / "imatrix.gguf", **options))
    reference = expected(source, data_folder)
    assert found.keys() == {f"{n}.{part}" for n in reference for part in ("in_sum2", "counts")}
    for name, (sum2_EC, tokens_E) in reference.items():
        counts_E1, in_sum2_EC = found[f"{name}.counts"], found[f"{name}.in_sum2"]
        assert counts_E1.dtype == in_sum2_EC.dtype == np.float32
        assert counts_E1.shape == (len(tokens_E), 1), name
        np.testing.assert_array_equal(counts_E1[:, 0], tokens_E.numpy(), err_msg=name)
        np.testing.assert_allclose(in_sum2_EC, sum2_EC.numpy(), rtol=1e-3, err_msg=name)
    assert fields["general.type"] == "imatrix"
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (3, 40)
    assert fields["imatrix.datasets"] == ["wikitext2"]


def test_every_quantised_matrix_of_the_gguf_has_its_values(checkpoints, data_folder, tmp_path):
    source = checkpoints("olmoe", num_hidden_layers=2)
    model = read(camera.export(source, tmp_path / "model.gguf"))[1]
    arguments = ["imatrix", str(source), str(tmp_path / "imatrix.gguf"), "--data", str(data_folder)]
    assert main([*arguments, "--samples", "2", "--length", "32", "--device", "cpu"]) == 0
    found = read(tmp_path / "imatrix.gguf")[1]
    for name, tensor in model.items():
        if tensor.ndim > 1 and "ffn_gate_inp" not in name and name.startswith("blk."):
            shape = found[f"{name}.in_sum2"].shape
            assert shape == (tensor.shape[0] if tensor.ndim == 3 else 1, tensor.shape[-1]), name


def test_what_is_not_measured_is_refused(checkpoints, tmp_path):
    with pytest.raises(CameraError, match="a model of type phimoe can't be written as GGUF"):
        camera.imatrix(checkpoints("phimoe"), tmp_path / "out.gguf", device="cpu")
    source = checkpoints("olmoe", num_hidden_layers=2)
    camera.compress(source, "rtn", tmp_path / "packed", bits=5.15, device="cpu", progress=False)
    with pytest.raises(CameraError, match="is a compressed checkpoint: export it as native"):
        camera.imatrix(tmp_path / "packed", tmp_path / "out.gguf", device="cpu")
    assert not (tmp_path / "out.gguf").exists()
