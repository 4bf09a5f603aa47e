"""Parameter counts and what a sparsity means in micro-experts."""

import pytest
import torch

from camera.moe.budget import budget_of
from camera.moe.families import FAMILIES as DECLARED
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.models import FAMILIES, build_model


def budget(family, **overrides):
    model = build_model(family, **overrides)
    return model, budget_of(model, model.model.layers, DECLARED[family], "model.layers")


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_the_parameters_by_name(family):
    model, found = budget(family)
    names = {name: p.numel() for name, p in model.named_parameters()}  # tied ones once
    buffers = sum(b.numel() for n, b in model.named_buffers() if "e_score_correction_bias" in n)
    assert found.dense.model == sum(names.values()) + buffers
    routed = sum(n for name, n in names.items() if ".experts." in name)
    assert found.dense.routed == routed
    if routed:
        shared = ("shared_expert.", "shared_experts.")
        pool = routed + sum(n for name, n in names.items() if any(s in name for s in shared))
    else:
        pool = sum(n for name, n in names.items() if ".mlp." in name)
    assert found.dense.moe == pool


def test_first_dense_layers_of_a_moe_model_are_in_no_pool():
    _, found = budget("deepseek_v3")
    assert sorted(found.layers) == [1, 2]


@pytest.mark.parametrize("of", ["moe", "model", "routed"])
def test_ratio_removes_the_named_share(of):
    _, found = budget("qwen2_moe")
    ratio = found.pool_ratio(0.3, of)
    assert ratio * found.prunable(of) == pytest.approx(0.3 * getattr(found.dense, of))


def test_unreachable_sparsity_names_the_largest():
    _, found = budget("deepseek_v2")
    largest = found.dense.moe / found.dense.model
    with pytest.raises(CameraError, match=f"largest possible for this model is {largest:.2f}"[:-1]):
        found.pool_ratio(0.95, "model")


def test_min_width_lowers_what_can_be_reached():
    _, found = budget("mixtral")
    found.pool_ratio(0.7, "moe", min_width=10)
    with pytest.raises(CameraError, match=r"min_width=20 is 0\.5\."):
        found.pool_ratio(0.7, "moe", min_width=20)


def test_blocks_that_must_stay_count_whole():
    _, found = budget("mixtral")  # experts of 40: a block of 16 stays in each
    found.pool_ratio(0.6, "moe", min_width=1, width_multiple=16)
    with pytest.raises(CameraError, match=r"min_width=1, width_multiple=16 is 0\.6\."):
        found.pool_ratio(0.61, "moe", min_width=1, width_multiple=16)


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5])
def test_sparsity_outside_zero_and_one_is_refused(sparsity):
    _, found = budget("mixtral")
    with pytest.raises(CameraError, match="between 0 and 1"):
        found.pool_ratio(sparsity, "moe")


def test_routed_share_of_a_dense_model_is_refused():
    _, found = budget("llama")
    with pytest.raises(CameraError, match="no routed experts"):
        found.pool_ratio(0.2, "routed")


def test_bytes_follow_the_dtype():
    assert (
        budget("mixtral", dtype=torch.bfloat16)[1].dense.bytes * 2
        == budget("mixtral")[1].dense.bytes
    )


def test_where_nothing_can_go_no_largest_share_is_named(checkpoints):
    budget = MetaModel(checkpoints("qwen3_moe")).budget
    with pytest.raises(
        CameraError, match=r"nothing of a layer .* can be removed with min_width=24"
    ):
        budget.pool_ratio(0.25, "moe", min_width=24)
