"""AIMER: the evenness of an expert's weights, without any text."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from baselines.experts.aimer import Aimer
from camera.streaming.skeleton import MetaModel


def scores(model, index=0):
    """Scores of a loaded layer as it is now; the lowest are removed."""
    method, ffn = Aimer(0.5, sparsity_of="routed"), model.feed_forward(index)
    return method.expert_scores(method.observer().build(index, ffn).result())


@pytest.fixture
def model(checkpoints):
    model = MetaModel(checkpoints("qwen2_moe"))
    model.load_layer(0)
    return model


def test_the_score_is_the_ratio_of_the_two_means(model, checkpoints):
    whole = AutoModelForCausalLM.from_pretrained(checkpoints("qwen2_moe"))
    experts, want = whole.model.layers[0].mlp.experts, []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        entries = [w for part in (gate_up, down) for w in part.detach().double().flatten().tolist()]
        mean = math.fsum(map(abs, entries)) / len(entries)
        want.append(-mean / math.sqrt(math.fsum(w * w for w in entries) / len(entries)))
    found_E = scores(model)
    torch.testing.assert_close(found_E, torch.tensor(want).double(), rtol=1e-6, atol=0)


def test_known_distributions_have_known_scores(model):
    experts = model.feed_forward(0).module.experts
    generator = torch.Generator().manual_seed(0)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).data
        weight[0] = torch.randn(weight[0].shape, generator=generator)
        weight[1] = weight[1].sign() * 0.3
        weight[2] = 0.0
    experts.down_proj.data[2, 0, 0] = 5.0
    found_E = scores(model)
    assert found_E[0].item() == pytest.approx(-math.sqrt(2 / math.pi), abs=0.02)
    assert found_E[1].item() == pytest.approx(-1, abs=1e-6)
    assert found_E.argmax() == 2  # one weight carries it: it stays longest


def test_scaling_an_expert_changes_nothing(model):
    experts, before_E = model.feed_forward(0).module.experts, scores(model)
    experts.gate_up_proj.data[3] *= 17.0
    experts.down_proj.data[3] *= 17.0
    torch.testing.assert_close(scores(model), before_E, rtol=1e-6, atol=0)


def test_the_most_even_experts_go_and_no_text_is_read(checkpoints, tmp_path):
    source = checkpoints("qwen2_moe")
    done = camera.compress(
        source, "aimer", tmp_path / "out", sparsity=0.5, sparsity_of="routed", device="cpu",
        progress=False, data=str(tmp_path / "nowhere"),
    )  # fmt: skip
    assert done.native and done.calibration is None
    model = MetaModel(source)
    for index in model.budget.layers:
        model.load_layer(index)
        score_E = scores(model, index)
        dropped = done.layers[str(index)]["dropped"]
        kept = [e for e in range(len(score_E)) if e not in dropped]
        assert len(dropped) == len(score_E) // 2
        assert score_E[dropped].max() <= score_E[kept].min()
