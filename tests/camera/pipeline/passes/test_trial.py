"""rank_scope=measured: what pruning a layer on trial costs the model decides what it gives.

Shapes: N micro-experts of a layer's pool, C trials.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from camera.calibration.statistics import Statistics
from camera.calibration.trials import TOKENS, trial_sample
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.pipeline.passes.trial import trial_costs
from camera.pruning.allocation import allocate
from camera.runtime.errors import CameraError
from camera.streaming.settings import MemoryChoices
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer
from tests.helpers.models import FAMILIES


def costs(model, ids_NL, masks):
    layers = len(model.layers)
    return trial_costs(LayerStreamer(model), ids_NL, masks, lambda _, start: range(start, layers))


def random_masks(model, shares):
    """Nested random trials."""
    torch.manual_seed(3)
    found = {}
    for i, pool in model.budget.layers.items():
        order = torch.randperm(pool.micro_experts)
        found[i] = []
        for share in shares:
            keep_N = torch.ones(len(order), dtype=torch.bool)
            keep_N[order[: int(share * len(order))]] = False
            found[i].append(keep_N)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trial_costs_what_the_whole_model_diverges_with_it(family, checkpoints):
    source = checkpoints(family)
    model = MetaModel(source)
    masks = random_masks(model, (0.3, 0.8))
    ids_NL = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    found = costs(model, ids_NL, masks)

    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = dense(ids_NL).logits.log_softmax(-1)
        for i, trials in masks.items():
            layer = dense.model.layers[i]
            before = {k: v.clone() for k, v in layer.state_dict().items()}
            for trial, keep_N in enumerate(trials):
                ffn = FeedForward(layer, family_of(dense.config.model_type), f"model.layers.{i}")
                gone = iter((~keep_N).split(ffn.widths))
                for group in ffn.groups:
                    for e in range(len(group.widths)):
                        group.down(e)[:, next(gone)] = 0
                cut = dense(ids_NL).logits.log_softmax(-1)
                cost = (expected.exp() * (expected - cut)).sum().double()
                torch.testing.assert_close(found[i].cost_C[trial], cost, rtol=1e-3, atol=1e-5)
                assert found[i].removed_C[trial] == (~keep_N).sum()
                layer.load_state_dict(before)


def test_a_layer_costs_nothing_whole_and_the_model_is_left_as_it_was(checkpoints):
    model = MetaModel(checkpoints("qwen2_moe"))
    ids_NL = torch.randint(0, 256, (2, 16))
    masks = random_masks(model, (0.0, 1.0))
    first, again = costs(model, ids_NL, masks), costs(model, ids_NL, masks)
    for i in masks:
        assert first[i].cost_C[0].abs() < 1e-4 < first[i].cost_C[1]
        assert torch.equal(first[i].cost_C, again[i].cost_C)


def test_a_process_tries_on_whole_samples_unless_they_are_long():
    ids_NL = torch.arange(40 * 100).view(40, 100)
    assert trial_sample(ids_NL, 1).shape == (10, 100)
    assert trial_sample(ids_NL, 4).shape == (2, 100)
    assert trial_sample(ids_NL.view(1, -1), 1).shape == (1, TOKENS)


MEASURED = dict(score="hidden_share", rank_scope="measured")


def run(source, out, calibration, data, sparsity=0.4, **settings):
    method = camera.CameraPlus(sparsity=sparsity, **MEASURED)
    return camera.compress(
        source, method, out, calibration=calibration, data=data, progress=False, **settings
    )


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "llama"])
def test_every_layer_gives_what_the_trials_say(
    family, checkpoints, calibration, data_folder, tmp_path
):
    source = checkpoints(family, num_hidden_layers=4)
    out, statistics = tmp_path / "out", tmp_path / "statistics"
    result = run(source, out, calibration, data_folder, statistics=statistics)
    (file,) = statistics.glob("*-cuts-*.safetensors")
    found = Statistics.load(file).layers
    sizes = [sum(layer.widths) for layer in found.values()]
    gone = allocate(
        [layer.removed_C.tolist() for layer in found.values()],
        [layer.cost_C.tolist() for layer in found.values()],
        int(0.4 * sum(sizes) + 1e-9),
    )
    kept = dict.fromkeys(found, 0)
    for path, widths in json.loads((out / "camera.json").read_text())["widths"].items():
        kept[int(path.split(".")[2])] += sum(widths)
    assert [n - k for n, k in zip(sizes, kept.values(), strict=True)] == gone
    assert len(set(gone)) > 1
    assert result.sparsity["moe"] == pytest.approx(0.4, abs=0.01)


def test_a_second_ratio_takes_the_costs_measured_for_the_first(
    checkpoints, calibration, data_folder, tmp_path, monkeypatch
):
    source, statistics = checkpoints("qwen2_moe"), tmp_path / "statistics"
    run(source, tmp_path / "a", calibration, data_folder, statistics=statistics)
    (file,) = statistics.glob("*-cuts-*.safetensors")
    before = file.stat().st_mtime_ns
    monkeypatch.setattr("camera.pipeline.passes.trial.trial_costs", None)  # can't be called
    run(source, tmp_path / "b", calibration, data_folder, statistics=statistics, sparsity=0.6)
    assert list(statistics.glob("*-cuts-*.safetensors")) == [file]
    assert file.stat().st_mtime_ns == before


def test_trials_are_refused_where_experts_stay_on_disk(
    checkpoints, calibration, data_folder, tmp_path
):
    method = camera.CameraPlus(sparsity=0.4, compensate="none", **MEASURED)
    memory = MemoryChoices(experts="disk")
    options = dict(calibration=calibration, data=data_folder, memory=memory)
    with pytest.raises(CameraError, match=r"set memory\.experts=ram"):
        camera.compress(checkpoints("qwen2_moe"), method, tmp_path / "out", **options)


def test_trials_are_refused_for_a_method_that_reads_no_text(checkpoints, tmp_path):
    with pytest.raises(CameraError, match="measured prunes on trial over calibration text"):
        camera.compress(
            checkpoints("qwen2_moe"),
            "magnitude",
            tmp_path / "o",
            sparsity=0.4,
            rank_scope="measured",
        )
