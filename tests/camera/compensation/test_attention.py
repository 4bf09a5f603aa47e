"""Attention's output weights take back what the cut layers before put out wrong.

Shapes: T tokens, H hidden, A what the attention heads put out together.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.loading import load_model, load_tokenizer
from camera.pipeline.passes import tokens
from camera.streaming.streamer import LayerStreamer
from tests.helpers.models import FAMILIES

RIDGE = 10.0


@pytest.fixture
def compress(data_folder, tmp_path):
    calibration = camera.Calibration(source="wikitext2", samples=48, length=64)

    def run(source, name, **options):
        camera.compress(
            source,
            "camera_p",
            tmp_path / name,
            sparsity=0.6,
            compensate="layer",
            data=str(data_folder),
            calibration=calibration,
            device="cpu",
            progress=False,
            **options,
        )
        return load_model(tmp_path / name, "cpu", "float32")

    def ids(source):
        tokenizer = load_tokenizer(source, False)
        return calibration_tokens(
            tokenizer, calibration, data=str(data_folder), seed=1234, max_length=128
        ).ids_NL

    return run, ids


def seen_by(model, module, ids):
    """The input of a module, [T, ...]."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad(), hook:
        model(ids)
    return seen[0].double()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_the_direct_solution_in_every_family(family, checkpoints, compress):
    run, ids_of = compress
    source = checkpoints(family, num_hidden_layers=3)
    ids, last = ids_of(source), 2
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    model = run(source, "dense", target="dense", ridges=[RIDGE])
    layer, before = model.model.layers[last], dense.model.layers[last]
    scale = getattr(layer, "residual_multiplier", 1.0)

    heads_TA = seen_by(model, layer.self_attn.o_proj, ids)
    entered_TH = seen_by(model, layer.input_layernorm, ids)
    aim_TH = seen_by(dense, before.post_attention_layernorm, ids)
    old_HA = before.self_attn.o_proj.weight.double()
    bias_H = before.self_attn.o_proj.bias
    put_TH = heads_TA @ old_HA.T + (0 if bias_H is None else bias_H.double())
    missing_TH = (aim_TH - entered_TH) / scale - put_TH

    counts_T1 = 1 / aim_TH.square().sum(1, keepdim=True)
    gram_AA = heads_TA.T @ (counts_T1 * heads_TA)
    norm2_A = old_HA.square().sum(0)
    stiffness = RIDGE * (gram_AA.diagonal() * norm2_A).mean()
    change_AH = torch.linalg.solve(
        gram_AA + stiffness * torch.diag(1 / norm2_A), heads_TA.T @ (counts_T1 * missing_TH)
    )
    got_HA = layer.self_attn.o_proj.weight.detach().double()
    assert change_AH.norm() > 1e-3 * old_HA.norm()
    # the model fits what fp32 runs left over, a small difference of large outputs
    assert (got_HA - old_HA - change_AH.T).norm() < 1e-2 * change_AH.norm()


def test_it_stays_as_it_is_where_nothing_went_wrong_before(checkpoints, compress):
    run, _ = compress
    source = checkpoints("qwen3_moe", num_hidden_layers=3)
    dense, model = AutoModelForCausalLM.from_pretrained(source), run(source, "d", target="dense")
    first, second = (
        torch.equal(*(m.model.layers[i].self_attn.o_proj.weight for m in (dense, model)))
        for i in (0, 1)
    )
    assert first and not second


def test_a_layer_runs_again_only_where_its_attention_changed(
    checkpoints, compress, monkeypatch, tmp_path
):
    run, _ = compress
    ran, attend = [], LayerStreamer.attend

    def counted(self, index, batches):
        ran.append(index)
        return attend(self, index, batches)

    monkeypatch.setattr(LayerStreamer, "attend", counted)
    source = checkpoints("qwen3_moe", num_hidden_layers=3)
    run(source, "d", target="dense")
    report = json.loads((tmp_path / "d" / "camera.json").read_text())
    for index in range(3):
        changed = any(report["layers"][str(index)]["attention"]["ridges"])
        assert ran.count(index) == (3 if changed else 2)  # the dense model's tokens, and these
    assert ran.count(0) == 2


def test_aiming_at_the_layer_leaves_attention_alone(checkpoints, compress):
    run, _ = compress
    source = checkpoints("deepseek_v3", num_hidden_layers=3)
    dense, model = AutoModelForCausalLM.from_pretrained(source), run(source, "l", target="layer")
    for a, b in zip(dense.model.layers, model.model.layers, strict=True):
        assert torch.equal(a.self_attn.o_proj.weight, b.self_attn.o_proj.weight)


def test_ranking_the_dense_model_refits_nothing(checkpoints, compress, monkeypatch):
    run, _ = compress
    refitted, refit = [], tokens.refit_attention

    def counted(output, *args):
        refitted.append(output)
        return refit(output, *args)

    monkeypatch.setattr(tokens, "refit_attention", counted)
    source = checkpoints("qwen3_moe", num_hidden_layers=3)
    run(source, "global", target="dense", rank_scope="global")
    assert len(refitted) == 3 == len(set(refitted))
