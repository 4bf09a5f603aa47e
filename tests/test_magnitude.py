"""Magnitude: weight norms rank micro-experts, without any text."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from baselines.magnitude import Magnitude
from camera.errors import CameraError
from camera.stream import Streamer
from conftest import FAMILIES
from oracles import basis, ffn_of, shared_of


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


def score(streamer, index, **settings):
    streamer.load_layer(index)
    method, ffn = Magnitude(sparsity=0.4, **settings), streamer.feed_forward(index)
    seen = method.observer(index, ffn).result()
    return method.score(index, seen, sum(ffn.widths))


@pytest.mark.parametrize("norm", ["product", "sum"])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "deepseek", "llama"])
def test_scores_are_norms_of_the_three_vectors(family, norm, checkpoints):
    folder = checkpoints(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = score(Streamer(folder), 2, norm=norm)
    gate, up = rows_of(ffn_of(model.model.layers[2]))
    down = basis(ffn_of(model.model.layers[2]))
    norms = [w.norm(dim=1) for w in (gate, up, down)]
    want = norms[0] * norms[1] * norms[2] if norm == "product" else torch.stack(norms).norm(dim=0)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


def test_the_product_ignores_rescaling_that_keeps_the_function(checkpoints):
    streamer = Streamer(checkpoints("qwen3_moe"))
    before = score(streamer, 0)
    experts = streamer.feed_forward(0).module.experts
    experts.gate_up_proj.data[3, 24 + 5] *= 4.0  # up row of micro-expert 5 of expert 3
    experts.down_proj.data[3, :, 5] /= 4.0
    ffn, method = streamer.feed_forward(0), Magnitude(sparsity=0.4)
    after = method.score(0, method.observer(0, ffn).result(), len(before))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    other = Magnitude(sparsity=0.4, norm="sum")
    changed = other.score(0, other.observer(0, ffn).result(), len(before))
    assert not torch.allclose(changed[3 * 24 + 5], score(streamer, 0, norm="sum")[3 * 24 + 5])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_compresses_without_calibration_and_the_largest_stay(family, checkpoints, tmp_path):
    method = Magnitude(sparsity=0.4)
    result = camera.compress(
        checkpoints(family), method, tmp_path / "out", device="cpu", progress=False
    )
    assert 0.38 < result.sparsity["moe"] <= 0.4
    assert not (tmp_path / "out" / "statistics.safetensors").exists()
    dense = AutoModelForCausalLM.from_pretrained(checkpoints(family))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    gate, up = rows_of(ffn_of(dense.model.layers[2]))
    norms = gate.norm(dim=1) * up.norm(dim=1) * basis(ffn_of(dense.model.layers[2])).norm(dim=1)
    remove = int(len(norms) * 0.4)
    kept = torch.ones(len(norms), dtype=torch.bool)
    kept[torch.argsort(norms)[:remove]] = False
    streamer = Streamer(tmp_path / "out")
    assert sum(streamer.feed_forward(2).widths) == len(norms) - remove
    ids = torch.arange(3, 40)[None]
    from oracles import zero_lowest

    for index, layer in enumerate(dense.model.layers):
        if index in streamer.budget.layers:
            ffn = ffn_of(layer)
            gate, up = rows_of(ffn)
            norms = gate.norm(dim=1) * up.norm(dim=1) * basis(ffn).norm(dim=1)
            zero_lowest(ffn, norms, int(len(norms) * 0.4))
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_unknown_norm_is_refused(checkpoints, tmp_path):
    with pytest.raises(CameraError, match=r"method\.norm=max"):
        camera.compress(
            checkpoints("qwen3_moe"), Magnitude(sparsity=0.4, norm="max"), tmp_path / "out"
        )
