"""Experts of one width: native checkpoints, whatever the family."""

import json
from itertools import product

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import camera
from camera.moe.budget import Budget, Count
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.pool import LayerPool
from camera.pruning.ranking import keep_highest
from camera.pruning.uniform import (
    UniformWidths,
    keep_uniform,
    least_loss,
    uniform_choices,
    uniform_widths,
)
from camera.runtime.errors import CameraError
from tests.helpers.models import FAMILIES

IDS = torch.arange(40).view(2, 20) * 7 % 250


def pruned(checkpoints, data_folder, calibration, out, family, **settings):
    settings = dict(expert_widths="uniform", sparsity=0.5, data=str(data_folder)) | settings
    method = settings.pop("method", "camera_p")
    return camera.compress(
        checkpoints(family), method, out, calibration=calibration, device="cpu", **settings
    )


def silenced(folder, plan):
    """The original model with the output weights of the micro-experts that were pruned set to 0."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for index, layer_plan in plan.layers.items():
        layer = model.get_submodule(f"model.layers.{index}")
        ffn = FeedForward(layer, family_of(model.config.model_type), "")
        start = 0
        for group in ffn.groups:
            for expert, width in enumerate(group.widths):
                gone = ~layer_plan.keep_N[start : start + width]
                group.down(expert).data[:, gone] = 0
                start += width
    return model


@pytest.mark.parametrize("family", [*FAMILIES, "hunyuan_v1_moe", "ernie4_5_moe"])
def test_the_checkpoint_is_native_and_computes_what_was_planned(
    family, checkpoints, data_folder, calibration, tmp_path
):
    out = tmp_path / "out"
    result = pruned(checkpoints, data_folder, calibration, out, family)
    config = json.loads((out / "config.json").read_text())
    assert result.native and "quantization_config" not in config
    assert all(len(set(widths)) == 1 for widths in result.widths.values())
    assert abs(result.sparsity["moe"] - 0.5) <= 0.01
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    want = silenced(checkpoints(family), camera.Plan.load(out))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, want(IDS).logits, rtol=1e-4, atol=1e-5)


def test_tensors_have_the_names_of_the_source(checkpoints, data_folder, calibration, tmp_path):
    source, out = checkpoints("qwen2_moe"), tmp_path / "out"
    pruned(checkpoints, data_folder, calibration, out, "qwen2_moe")

    def tensors(folder):
        return {
            name: (len(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype())
            for part in folder.glob("*.safetensors")
            if part.name.startswith("model")
            for file in [safe_open(part, "pt")]
            for name in file.keys()  # noqa: SIM118 (a file is no dict)
        }

    assert tensors(out) == tensors(source)


def test_experts_on_disk_give_the_same_bytes(checkpoints, data_folder, calibration, tmp_path):
    for name in ("ram", "disk"):
        memory = camera.MemoryChoices(experts=name)
        pruned(checkpoints, data_folder, calibration, tmp_path / name, "mixtral", memory=memory)
    for file in (tmp_path / "ram").glob("model*.safetensors"):
        assert file.read_bytes() == (tmp_path / "disk" / file.name).read_bytes()


def test_what_stays_may_be_refitted(checkpoints, data_folder, calibration, tmp_path):
    out = tmp_path / "out"
    result = pruned(checkpoints, data_folder, calibration, out, "qwen2_moe", compensate="layer")
    assert all(0 < layer["missing"] < 0.95 for layer in result.layers.values())
    model = AutoModelForCausalLM.from_pretrained(out)
    plain = silenced(checkpoints("qwen2_moe"), camera.Plan.load(out))
    kept = (
        camera.Plan.load(out).layers[0].keep_N[: model.config.shared_expert_intermediate_size * 2]
    )
    refitted, before = (
        m.model.layers[0].mlp.shared_expert.down_proj.weight for m in (model, plain)
    )
    assert refitted.shape == before[:, kept].shape and not torch.equal(refitted, before[:, kept])


@pytest.mark.parametrize(
    "method, scope",
    [("heapr", "global"), ("magnitude", "layer"), ("random", "global"), ("camera_plus", "global")],
)
def test_every_score_can_rank_within_experts(
    method, scope, checkpoints, data_folder, calibration, tmp_path
):
    result = pruned(
        checkpoints, data_folder, calibration, tmp_path / "out", "qwen3_moe",
        method=method, rank_scope=scope,
    )  # fmt: skip
    assert result.native
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_routed_experts_alone_leave_the_shared_one_whole(
    checkpoints, data_folder, calibration, tmp_path
):
    result = pruned(
        checkpoints, data_folder, calibration, tmp_path / "out", "qwen2_moe", sparsity_of="routed"
    )
    for path, widths in result.widths.items():
        whole = widths[0] == result.full_widths[path]
        assert whole == ("shared" in path)


def pools_of(layers, experts, width, shared):
    widths, routed = [shared] + [width] * experts, [False] + [True] * experts
    whole = layers * sum(widths)
    budget = Budget(Count(whole, whole, layers * experts * width, 0), model_type="qwen2_moe")
    budget.layers.update({i: LayerPool(list(widths), list(routed)) for i in range(layers)})
    return budget


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_kinds_keep_the_widths_that_lose_the_least(scale, multiple):
    """Against all pairs of widths, each tried; `scale` makes the shared expert cheap or dear."""
    budget = pools_of(layers=2, experts=4, width=16, shared=32)
    pools, draw = list(budget.layers.values()), torch.Generator().manual_seed(3)
    scores = [torch.rand(96, generator=draw, dtype=torch.float64) for _ in pools]
    for score_N in scores:
        score_N[:32] *= scale
    found = least_loss(uniform_choices(budget, 0.375, "moe", multiple, 0), scores, pools)

    def lost(widths):
        keeps = [
            keep_uniform(scores[i], pools[i].widths, widths.of(pools[i].routed)) for i in (0, 1)
        ]
        return sum(float(scores[i][~keeps[i]].sum()) for i in (0, 1))

    steps = [range(multiple, whole + 1, multiple) for whole in (16, 32)]
    pairs = [UniformWidths(*pair) for pair in product(*steps) if 4 * pair[0] + pair[1] == 60]
    assert lost(found) == pytest.approx(min(map(lost, pairs)))
    assert scale != 100.0 or found.shared >= 28
    assert scale != 0.01 or found.shared <= 12


@pytest.mark.parametrize("dear", [False, True])
def test_a_multiple_that_kernels_like_is_taken_where_it_costs_little(dear):
    """`dear`: the shared expert would have to give what is worth a hundred times as much."""
    budget = pools_of(layers=1, experts=4, width=64, shared=128)
    score_N, pools = torch.ones(384), list(budget.layers.values())
    if dear:
        score_N[:128] = 100.0
    found = least_loss(uniform_choices(budget, 0.375, "moe", 1, 0), [score_N], pools)
    assert found == (UniformWidths(28, 128) if dear else UniformWidths(32, 112))


def test_both_kinds_lose_the_share_in_the_best_multiple_that_comes_near_it():
    budget = pools_of(layers=1, experts=8, width=1408, shared=2816)
    asked = (budget, 0.4, "moe")
    assert uniform_widths(*asked, 1, 0) == UniformWidths(832, 1664)  # of 64: 40.9 %
    with pytest.raises(CameraError, match="width_multiple=256"):
        uniform_widths(*asked, 256, 0)


def test_a_shared_expert_that_every_token_needs_keeps_more_of_its_width(
    checkpoints, data_folder, calibration, tmp_path
):
    result = pruned(
        checkpoints, data_folder, calibration, tmp_path / "out", "qwen2_moe",
        method="heapr", normalize="all", rank_scope="global",
    )  # fmt: skip
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    whole = json.loads((checkpoints("qwen2_moe") / "config.json").read_text())
    keys = ("shared_expert_intermediate_size", "moe_intermediate_size")
    shared, routed = (getattr(config, key) / whole[key] for key in keys)
    assert abs(result.sparsity["moe"] - 0.5) <= 0.01 and shared > 0.6 > routed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(width_multiple=16, sparsity=0.3), "use sparsity=.* or .*, or a smaller"),
        (dict(rank_scope="measured"), "set rank_scope=global or layer"),
        (dict(layer_floor=0.1), "set layer_floor=0.0"),
        (dict(expert_widths="equal"), "none of ragged, uniform"),
    ],
)
def test_what_can_not_be_uniform_is_refused_before_text_is_read(
    settings, message, checkpoints, tmp_path
):
    with pytest.raises(CameraError, match=message):
        settings = dict(sparsity=0.5, expert_widths="uniform") | settings
        camera.compress(
            checkpoints("qwen2_moe"), "camera_p", tmp_path / "out", data=str(tmp_path), **settings
        )


def test_the_refusal_names_sparsities_that_fit(checkpoints, data_folder, calibration, tmp_path):
    asked = dict(width_multiple=16)
    with pytest.raises(CameraError) as refusal:
        pruned(checkpoints, data_folder, calibration, tmp_path / "a", "qwen3_moe",
               sparsity=0.3, **asked)  # fmt: skip
    named = float(str(refusal.value).split("use sparsity=")[1].split()[0])
    result = pruned(checkpoints, data_folder, calibration, tmp_path / "b", "qwen3_moe",
                    sparsity=named, **asked)  # fmt: skip
    assert abs(result.sparsity["moe"] - named) < 1e-3


def test_a_latent_deepseek_has_one_width_for_both_kinds(checkpoints, tmp_path):
    with pytest.raises(CameraError, match="one width for routed and shared"):
        camera.compress(
            checkpoints("deepseek_v3"), "camera_p", tmp_path / "out",
            sparsity=0.5, sparsity_of="routed", expert_widths="uniform",
        )  # fmt: skip


def test_one_expert_keeps_what_the_ragged_ranking_keeps():
    score_N = torch.tensor([3.0, 1.0, 1.0, 2.0, 5.0, 0.0])
    assert torch.equal(keep_uniform(score_N, [6], [3]), keep_highest(score_N, [6], 3))
    assert keep_uniform(score_N, [3, 3], [1, 2]).tolist() == [True, False, False, True, True, False]
