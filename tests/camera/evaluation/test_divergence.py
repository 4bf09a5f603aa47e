"""KL divergence, agreement and acceptance against plain sums over the whole vocabulary."""

import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file

import camera
from camera.checkpoint.loading import load_model, load_tokenizer
from camera.evaluation.divergence.meter import MEASURES, compared
from camera.evaluation.divergence.reference import DenseReference
from camera.evaluation.perplexity import perplexity
from camera.evaluation.suite import EvaluationRequest, evaluate_streamed
from camera.runtime.errors import CameraError
from camera.streaming import lm_head

SIZES = dict(length=48, stride=20)
BLOCKS = 5
EVERYTHING = 10**6  # more tokens than any vocabulary has


@pytest.fixture(scope="module")
def dense(checkpoints):
    return checkpoints("qwen2_moe")


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "model"
    camera.compress(dense, "random", out, sparsity=0.5, device="cpu", progress=False)
    return out


def reference_of(dense, folder=None):
    return DenseReference(dense, folder, "cpu", progress=False)


def measured(model, data, dense, top, folder=None, **sizes):
    options = dict(corpus="wikitext2", data=data, limit=BLOCKS, progress=False)
    options |= dict(reference=reference_of(dense, folder), top=top, **{**SIZES, **sizes})
    return perplexity(load_model(model, "cpu"), load_tokenizer(model), **options)


def plainly(model, dense, data):
    """Of each block the means over its scored tokens, from all probabilities of both models."""
    text = (data / "wikitext2/test.txt").read_text().splitlines(keepends=True)
    ids = load_tokenizer(model)("\n\n".join(text), return_tensors="pt").input_ids[0]
    p_model, q_model = (load_model(folder, "cpu").eval() for folder in (dense, model))
    found, begin, seen = [], 0, 1
    for _ in range(BLOCKS):
        end = min(begin + SIZES["length"], len(ids))
        with torch.no_grad():
            p, q = (
                m(ids[None, begin:end]).logits[0, seen - begin - 1 : -1].double().softmax(-1)
                for m in (p_model, q_model)
            )
        kl = (p * (p.log() - q.log())).sum(-1)
        same = (p.argmax(-1) == q.argmax(-1)).double()
        found.append([kl, same, torch.minimum(p, q).sum(-1)])
        begin, seen = begin + SIZES["stride"], end
    return found


def test_with_the_whole_vocabulary_they_are_the_plain_sums(dense, pruned, data_folder):
    got = measured(pruned, data_folder, dense, EVERYTHING)["divergence"]
    blocks = plainly(pruned, dense, data_folder)
    assert got["top"] == got["vocabulary"] and got["kept"] == pytest.approx(1)
    for name, values in zip(MEASURES, zip(*blocks, strict=True), strict=True):
        everything = torch.cat(values)
        assert got[name] == pytest.approx(everything.mean().item(), rel=1e-4), name
        assert got[f"{name}_per_block"] == pytest.approx(
            [v.mean().item() for v in values], rel=1e-4, abs=1e-7
        )
        # the error of a ratio of sums, over blocks as draws
        rest = [(v - everything.mean()).sum().item() for v in values]
        error = math.sqrt(BLOCKS / (BLOCKS - 1) * sum(r * r for r in rest)) / len(everything)
        assert got[f"{name}_stderr"] == pytest.approx(error, rel=1e-3)
    assert got["kl"] > 0.001 and 0 < got["acceptance"] < 1


def test_what_is_cut_off_bounds_what_is_exact(dense, pruned, data_folder):
    tops = [1, 4, 32, EVERYTHING]
    found = [measured(pruned, data_folder, dense, top)["divergence"] for top in tops]
    kl, acceptance, kept = ([f[name] for f in found] for name in ("kl", "acceptance", "kept"))
    assert kl == sorted(kl) and kl[0] < kl[-1]
    assert acceptance == sorted(acceptance, reverse=True) and acceptance[0] > acceptance[-1]
    assert kept == sorted(kept) and len({f["agreement"] for f in found}) == 1


@pytest.mark.parametrize("top", [3, EVERYTHING])
def test_a_model_differs_in_nothing_from_itself(dense, data_folder, top):
    measures = EvaluationRequest(
        data_folder, ["wikitext2", "c4"], blocks=3, divergence=top, length=48
    )
    found = evaluate_streamed(
        dense, measures, reference=reference_of(dense), device="cpu", progress=False
    )
    for part in found["perplexity"].values():
        same = part["divergence"]
        assert abs(same["kl"]) < 1e-12 and same["agreement"] == 1
        assert same["acceptance"] == pytest.approx(1, abs=1e-12)


def test_tied_likeliest_tokens_agree():
    log_AV = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.5, 0.4]]).log()
    for first in (0, 1):
        ids_AK = torch.tensor([[first], [0]])
        rest_A = torch.tensor([0.6, 0.1]).log()
        _, agreement, _ = compared(ids_AK, torch.tensor([[0.4], [0.9]]).log(), rest_A, log_AV)
        assert agreement.tolist() == [True, False]


def test_a_vanished_rest_of_the_dense_model_costs_nothing():
    log_AV = torch.tensor([[0.5, 0.25, 0.25]]).log()
    kl, _, acceptance = compared(
        torch.tensor([[0]]), torch.zeros(1, 1), torch.tensor([-math.inf]), log_AV
    )
    assert kl.item() == pytest.approx(math.log(2)) and acceptance.item() == pytest.approx(0.5)


@pytest.mark.parametrize("stride", [20, 48])
def test_a_streamed_model_differs_as_in_memory(
    dense, pruned, data_folder, tmp_path, monkeypatch, stride
):
    monkeypatch.setattr(lm_head, "HEAD_LOGITS", 40_000)  # heads in several chunks
    sizes = dict(length=48, stride=stride)
    measures = EvaluationRequest(
        data_folder, ["wikitext2", "c4"], **sizes, blocks=BLOCKS, divergence=8
    )
    kept = reference_of(dense, tmp_path)
    streamed = evaluate_streamed(pruned, measures, reference=kept, device="cpu", progress=False)
    got = streamed["perplexity"]["wikitext2"]["divergence"]
    want = measured(pruned, data_folder, dense, 8, tmp_path, **sizes)["divergence"]
    for key in want:
        assert got[key] == pytest.approx(want[key], rel=1e-4, abs=1e-7), key


def test_on_the_way_a_layer_at_a_time_it_is_that_of_the_checkpoint(dense, data_folder, tmp_path):
    measures = EvaluationRequest(data_folder, ["c4"], length=32, blocks=2, divergence=8)
    options = dict(sparsity=0.4, measures=measures, device="cpu", progress=False)
    camera.compress(dense, "random", tmp_path / "out", **options)
    during = json.loads((tmp_path / "out" / "evaluation.json").read_text())["perplexity"]["c4"]
    after = evaluate_streamed(
        tmp_path / "out", measures, reference=reference_of(dense), device="cpu", progress=False
    )["perplexity"]["c4"]
    for name in MEASURES:
        assert during["divergence"][name] == pytest.approx(
            after["divergence"][name], rel=1e-4, abs=1e-6
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_dense_model_is_read_once_and_again_where_the_file_is_damaged(
    dense, pruned, data_folder, tmp_path, monkeypatch, caplog
):
    made, make = [], DenseReference._made
    monkeypatch.setattr(
        DenseReference, "_made", lambda s, p, t: (made.append(len(p)), make(s, p, t))[1]
    )
    first = measured(pruned, data_folder, dense, 8, tmp_path)
    again = measured(pruned, data_folder, dense, 8, tmp_path)
    assert made == [1] and again["divergence"] == first["divergence"]
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    scored = first["tokens"]
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        "ids": (scored, 8),
        "log": (scored, 8),
        "rest": (scored,),
    }
    measured(pruned, data_folder, dense, 9, tmp_path)  # another question
    measured(pruned, data_folder, dense, 8, tmp_path, stride=48)
    assert made == [1, 1, 1]
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        mended = measured(pruned, data_folder, dense, 8, tmp_path)
    assert made == [1] * 4 and mended["divergence"] == first["divergence"]
    assert "made anew" in caplog.text


def test_without_a_dense_model_there_is_nothing_to_compare_with(pruned, data_folder):
    measures = EvaluationRequest(data_folder, ["c4"], blocks=1, length=32, divergence=8)
    with pytest.raises(CameraError, match=r"evaluation\.divergence compares with the dense model"):
        evaluate_streamed(pruned, measures, device="cpu", progress=False)


def test_evaluate_compares_with_the_dense_model_it_is_given(dense, pruned, data_folder):
    options = dict(data=data_folder, length=32, blocks=2, device="cpu", progress=False)
    options |= dict(perplexity=["c4"], dense=dense, divergence=8)
    found = [
        camera.evaluate(pruned, stream=stream, **options)["perplexity"]["c4"]["divergence"]
        for stream in ("never", "always")
    ]
    assert found[0]["kl"] == pytest.approx(found[1]["kl"], rel=1e-4) and found[0]["top"] == 8
