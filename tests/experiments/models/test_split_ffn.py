"""A dense model's FFNs split into experts: nothing is lost but what tokens aren't sent to."""

import pytest
import torch

from camera.runtime.errors import CameraError
from experiments.models import split_ffn
from tests.helpers.models import build_model

SHARED, EXPERTS = 16, 4


@pytest.fixture
def dense():
    return build_model("llama", intermediate_size=48, num_hidden_layers=2, initializer_range=0.3)


@pytest.fixture
def text(dense):
    return split_ffn.own_text(dense, samples=8, length=24, seed=0)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_a_model_writes_whole_texts_that_the_seed_fixes(dense, text):
    assert text.shape == (8, 24)
    assert torch.equal(text, split_ffn.own_text(dense, samples=8, length=24, seed=0))
    assert not torch.equal(text, split_ffn.own_text(dense, samples=8, length=24, seed=1))


def test_with_every_expert_chosen_the_split_model_is_the_dense_one(dense, text, monkeypatch):
    monkeypatch.setattr(split_ffn, "ROUTER_SCALE", 0.0)
    moe = split_ffn.split(dense, text, SHARED, EXPERTS, active=EXPERTS)
    torch.testing.assert_close(logits(moe, text), logits(dense, text), rtol=1e-3, atol=1e-4)


def test_every_micro_expert_has_one_place(dense, text):
    moe = split_ffn.split(dense, text, SHARED, EXPERTS, active=2)
    for before, after in zip(dense.model.layers, moe.model.layers, strict=True):
        gates, _ = after.mlp.experts.gate_up_proj.chunk(2, dim=1)
        rows = torch.cat([after.mlp.shared_expert.gate_proj.weight, gates.flatten(0, 1)])
        expected = before.mlp.gate_proj.weight
        assert rows.shape == expected.shape
        assert torch.equal(rows[rows[:, 0].argsort()], expected[expected[:, 0].argsort()])


def test_router_and_refit_each_bring_it_closer_to_the_dense_model(dense, text, monkeypatch):
    def distance():
        moe = split_ffn.split(dense, text, SHARED, EXPERTS, active=2)
        return (logits(moe, text) - logits(dense, text)).square().mean()

    whole = distance()
    with monkeypatch.context() as patch:
        patch.setattr(split_ffn, "refitted", lambda phi_TI, down_HI, sent_TI: down_HI)
        unfitted = distance()
        ranked = split_ffn.router_weight
        patch.setattr(split_ffn, "router_weight", lambda x_TH, norm_TE: -ranked(x_TH, norm_TE))
        assert whole < unfitted < distance()


def test_clusters_of_equal_size_find_what_is_active_together():
    torch.manual_seed(0)
    patterns = torch.eye(3).repeat_interleave(20, 1)
    features = patterns.repeat(5, 1) + 0.1 * torch.rand(15, 60)
    members = split_ffn.balanced_clusters(torch.nn.functional.normalize(features, dim=1), 3)
    assert sorted(sorted(m) for m in (members % 3).tolist()) == [[0] * 5, [1] * 5, [2] * 5]
    assert sorted(members.flatten().tolist()) == list(range(15))


def test_widths_that_do_not_divide_are_refused(dense, text):
    with pytest.raises(SystemExit, match="48 micro-experts less 10 shared ones"):
        split_ffn.split(dense, text, shared=10, experts=4, active=2)


def test_what_the_machine_cannot_hold_is_refused(dense, monkeypatch):
    watched = 4 * 1000 * 2 * (32 + 48)
    needed = watched + 4 * dense.num_parameters()
    monkeypatch.setattr(split_ffn, "free_host_memory", lambda: needed)
    split_ffn.require_memory(dense, tokens=1000)
    monkeypatch.setattr(split_ffn, "free_host_memory", lambda: needed - 1)
    with pytest.raises(CameraError, match="activations: lower --samples or --length"):
        split_ffn.require_memory(dense, tokens=1000)
