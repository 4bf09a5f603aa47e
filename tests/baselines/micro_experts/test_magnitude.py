"""Magnitude: weight norms rank micro-experts, without any text."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from baselines.micro_experts.magnitude import Magnitude
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.oracles import basis, ffn_of, shared_of, zero_lowest


def rows_of(ffn):
    """gate and up rows of every micro-expert, [N, H] each."""
    gates, ups = [], []
    mlp = shared_of(ffn) if hasattr(ffn, "experts") else ffn
    if mlp is not None:
        gates.append(mlp.gate_proj.weight)
        ups.append(mlp.up_proj.weight)
    if hasattr(ffn, "experts"):
        for gate_up in ffn.experts.gate_up_proj:
            gate, up = gate_up.chunk(2)
            gates.append(gate)
            ups.append(up)
    return torch.cat(gates).double().detach(), torch.cat(ups).double().detach()


def score_of(ffn, index, **settings):
    """The scores of a loaded layer as it is now."""
    score = Magnitude(sparsity=0.4, **settings).ranked_by()
    seen = score.observer().build(index, ffn).result()
    return score.of_layer(index, seen, sum(ffn.widths))


@pytest.mark.parametrize("score", ["weight_product", "weight_sum"])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "deepseek", "llama"])
def test_scores_are_norms_of_the_three_vectors(family, score, checkpoints):
    folder = checkpoints(family)
    model, streamed = AutoModelForCausalLM.from_pretrained(folder), MetaModel(folder)
    streamed.load_layer(2)
    found = score_of(streamed.feed_forward(2), 2, score=score)
    gate, up = rows_of(ffn_of(model.model.layers[2]))
    down = basis(ffn_of(model.model.layers[2]))
    norms = [w.norm(dim=1) for w in (gate, up, down)]
    product = score == "weight_product"
    want = norms[0] * norms[1] * norms[2] if product else torch.stack(norms).norm(dim=0)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


def test_the_product_ignores_rescaling_that_keeps_the_function(checkpoints):
    model = MetaModel(checkpoints("qwen3_moe"))
    model.load_layer(0)
    ffn = model.feed_forward(0)
    before, sums_before = score_of(ffn, 0), score_of(ffn, 0, score="weight_sum")
    experts = ffn.module.experts
    experts.gate_up_proj.data[3, 24 + 5] *= 4.0  # up row of micro-expert 5 of expert 3
    experts.down_proj.data[3, :, 5] /= 4.0
    torch.testing.assert_close(score_of(ffn, 0), before, rtol=1e-6, atol=0)
    changed = score_of(ffn, 0, score="weight_sum")
    assert not torch.allclose(changed[3 * 24 + 5], sums_before[3 * 24 + 5])


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek", "granitemoe", "llama"])
def test_it_removes_the_smallest_of_every_layer_without_calibration(family, checkpoints, tmp_path):
    folder, out = checkpoints(family), tmp_path / "out"
    method = Magnitude(sparsity=0.4)
    result = camera.compress(folder, method, out, device="cpu", progress=False)
    assert 0.38 < result.sparsity["moe"] <= 0.4
    masked, pruned = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, out))
    for index in MetaModel(folder).budget.layers:
        ffn = ffn_of(masked.model.layers[index])
        gate, up = rows_of(ffn)
        norm_N = gate.norm(dim=1) * up.norm(dim=1) * basis(ffn).norm(dim=1)
        zero_lowest(ffn, norm_N, int(len(norm_N) * 0.4))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want = masked(ids).logits
        torch.testing.assert_close(pruned(ids).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [(dict(score="max"), r"method\.score=max"), (dict(rank_scope="all"), "rank_scope=all is none")],
)
def test_what_it_does_not_know_is_refused(settings, told, checkpoints, tmp_path):
    method = Magnitude(sparsity=0.4, **settings)
    with pytest.raises(CameraError, match=told):
        camera.compress(checkpoints("qwen3_moe"), method, tmp_path / "out", device="cpu")
