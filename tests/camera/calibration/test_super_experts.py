"""Super experts: found by their outliers, reported, and spared where a cut would hit them."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from camera.calibration.experts.super_experts import super_experts
from camera.calibration.scores.energy import EnergyStatistics
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.loading import load_tokenizer
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.checkpoints import changed, shards_of
from tests.helpers.oracles import capture

LAYER = 1
CUT = dict(sparsity=0.4)
DROP = dict(sparsity=0.5, sparsity_of="routed")


def dense(source):
    return AutoModelForCausalLM.from_pretrained(source).eval()


@pytest.fixture
def options(data_folder, calibration):
    return dict(calibration=calibration, data=str(data_folder), device="cpu", progress=False)


@pytest.fixture
def least_used(checkpoints, options):
    """The expert of layer 1 that the dense model's router chooses least, and its tokens."""
    source = checkpoints("qwen3_moe")
    tokens = calibration_tokens(
        load_tokenizer(source, False),
        options["calibration"],
        data=options["data"],
        seed=1234,
        max_length=128,
    )
    index_TK = capture(dense(source), LAYER, tokens.ids_NL)[1][0]
    counts_E = torch.bincount(index_TK.flatten(), minlength=8)
    assert counts_E.min() > 0
    return int(counts_E.argmin()), tokens.ids_NL


@pytest.fixture
def source(checkpoints, least_used, tmp_path):
    """A model whose least used expert of layer 1 writes a massive activation into channel 5."""
    name = f"model.layers.{LAYER}.mlp.experts.{least_used[0]}.down_proj.weight"

    def change(tensors):
        tensors[name][5] *= 1e7
        return tensors

    return changed(checkpoints("qwen3_moe"), tmp_path / "source", change)


def largest_output(source, expert, ids):
    """max |f_e(x)| over the tokens routed to an expert, by the weights."""
    model = dense(source)
    x_TH, (index_TK, _) = capture(model, LAYER, ids)
    experts = model.model.layers[LAYER].mlp.experts
    x_NH = x_TH[(index_TK == expert).any(1)].double()
    gate, up = (x_NH @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
    h_NW = torch.nn.functional.silu(gate) * up
    return (h_NW @ experts.down_proj[expert].double().T).abs().max().item()


@pytest.mark.parametrize("propagate", ["dense", "compressed"])
def test_a_super_expert_is_told_and_spared_by_methods_of_whole_experts(
    propagate, source, least_used, options, tmp_path, caplog
):
    expert, ids = least_used
    options |= dict(propagate=propagate)
    with caplog.at_level("INFO", "camera"):
        done = camera.compress(source, "frequency", tmp_path / "out", **DROP, **options)
    assert expert not in done.layers[str(LAYER)]["dropped"]
    assert done.layers[str(LAYER)]["spared"] == [expert]
    ((layer, found),) = done.super_experts.items()
    want = largest_output(source, expert, ids)
    assert layer == str(LAYER) and list(found) == [str(expert)]
    # layer 0 lost experts before, where that is propagated
    rel = 1e-3 if propagate == "dense" else 3
    assert found[str(expert)] == pytest.approx(want, rel=rel)
    assert f"layer {LAYER}: super expert {expert} (outputs to" in caplog.text
    stored = json.loads((tmp_path / "out" / "camera.json").read_text())
    assert stored["super_experts"] == done.super_experts
    plan = camera.Plan.load(tmp_path / "out")
    assert plan.shared["super_experts"] == done.super_experts
    cut = camera.compress(
        source, "frequency", tmp_path / "cut", spare_super_experts=False, **DROP, **options
    )
    assert expert in cut.layers[str(LAYER)]["dropped"]
    assert cut.super_experts and "spared" not in cut.layers[str(LAYER)]


@pytest.mark.parametrize("search", ["enumerate", "greedy", "independent"])
def test_a_search_for_experts_spares_it(search, source, least_used, options, tmp_path):
    done = camera.compress(source, "naee", tmp_path / "out", search=search, **DROP, **options)
    assert least_used[0] not in done.layers[str(LAYER)]["dropped"]
    assert len(done.layers[str(LAYER)]["dropped"]) == 4


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("camera_p", {}),
        ("camera_p", dict(rank_scope="global")),
        ("camera_p", dict(rank_scope="measured", width_multiple=4)),
        ("heapr", {}),
        ("camera_plus", dict(score="projection", rank_scope="layer", compensate="none")),
    ],
)
def test_its_micro_experts_stay_whatever_ranks(
    method, settings, source, least_used, options, tmp_path
):
    """At the same removed share, which the others make up for."""
    expert, path = least_used[0], f"model.layers.{LAYER}.mlp.experts"
    done = camera.compress(source, method, tmp_path / "out", **CUT, **settings, **options)
    assert done.widths[path][expert] == done.full_widths[path]
    assert done.sparsity["moe"] == pytest.approx(0.4, abs=0.01)
    assert list(done.super_experts[str(LAYER)]) == [str(expert)]


@pytest.mark.parametrize(
    "limits", [{}, dict(sparsity_of="routed"), dict(width_multiple=4, min_width=4)]
)
def test_a_super_expert_stays_whole_though_it_ranks_last(limits, checkpoints):
    budget = MetaModel(checkpoints("qwen2_moe")).budget
    pool = budget.layers[LAYER]
    count, widths = pool.micro_experts, pool.widths
    energy_N = torch.rand(count, generator=torch.Generator().manual_seed(3)) + 1
    rank_last = 4
    start = sum(widths[:rank_last])
    energy_N[start : start + widths[rank_last]] = 1e-6
    seen = EnergyStatistics(
        {"experts": widths}, energy_N.double(), energy_N, torch.ones(count), torch.ones(len(widths))
    )
    method = camera.CameraP(sparsity=0.4, **limits)
    cut_N = method.masks({LAYER: seen}, budget, [LAYER])[LAYER]
    assert int(cut_N.split(widths)[rank_last].sum()) == limits.get("min_width", 0)
    pool.super_experts = [rank_last]
    kept_N = method.masks({LAYER: seen}, budget, [LAYER])[LAYER]
    assert kept_N.split(widths)[rank_last].all()
    assert kept_N.sum() == cut_N.sum()
    same = camera.CameraP(sparsity=0.4, spare_super_experts=False, **limits)
    assert torch.equal(same.masks({LAYER: seen}, budget, [LAYER])[LAYER], cut_N)


def test_one_width_for_all_says_that_it_cuts_a_super_expert(
    source, least_used, options, tmp_path, caplog
):
    options |= dict(expert_widths="uniform", width_multiple=1, sparsity=0.375)
    camera.compress(source, "camera_p", tmp_path / "out", **options)
    told = f"layer {LAYER}: expert_widths=uniform cuts super expert {least_used[0]} like all"
    assert told in caplog.text


def test_a_cut_that_leaves_nothing_else_is_refused(source, least_used, options, tmp_path):
    with pytest.raises(CameraError) as refused:
        camera.compress(source, "camera_p", tmp_path / "out", sparsity=0.95, **options)
    assert f"(expert {least_used[0]} of layer {LAYER}): use a smaller" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank_scope", ["layer", "global"])
def test_the_only_expert_of_a_layer_is_cut_like_any_other(
    rank_scope, checkpoints, options, tmp_path
):
    """Of a dense model a whole FFN would be spared, and nothing else of its layer could go."""
    name = f"model.layers.{LAYER}.mlp.down_proj.weight"

    def change(tensors):
        tensors[name][5] *= 1e7
        return tensors

    source = changed(checkpoints("llama"), tmp_path / "source", change)
    result = camera.compress(
        source, "camera_p", tmp_path / "cut", **CUT, rank_scope=rank_scope, **options
    )
    assert abs(result.sparsity["moe"] - 0.4) < 0.02
    assert result.super_experts == {}


@pytest.mark.parametrize("method", ["camera_p", "frequency"])
def test_a_model_without_any_is_cut_as_before(method, checkpoints, options, tmp_path):
    asked = CUT if method == "camera_p" else DROP
    made = [
        camera.compress(
            checkpoints("qwen3_moe"), method, tmp_path / str(n), spare_super_experts=n, **asked,
            **options,
        )
        for n in (False, True)
    ]  # fmt: skip
    assert not made[1].super_experts
    assert shards_of(tmp_path / "False") == shards_of(tmp_path / "True")


def test_who_is_super_is_as_the_paper_says():
    """Against percentile and maximum of all outputs, on layers with massive activations."""
    random = np.random.default_rng(0)
    a_LE = random.lognormal(2.0, 1.5, size=(12, 64))
    a_LE[[1, 2, 3, 10, 4], [5, 9, 33, 7, 8]] = [9000.0, 4000.0, 901.0, 8000.0, 700.0]
    found = {
        str(layer): {
            "median": 0.4,
            "largest": {str(e): float(a) for e, a in enumerate(row) if a > 100},
        }
        for layer, row in enumerate(a_LE)
    }
    limit = max(np.percentile(a_LE, 99.5), a_LE.max() / 10)
    want = {
        layer: np.flatnonzero(row > limit).tolist()
        for layer, row in enumerate(a_LE[:9])  # the last quarter of the layers forms none
        if (row > limit).any()
    }
    assert want == {1: [5], 2: [9], 3: [33]}
    assert super_experts(found, a_LE.size, 12) == want
    for seen in found.values():  # outputs that are large beside nothing
        seen["median"] = 9.5
    assert super_experts(found, a_LE.size, 12) == {}
