"""rank_scope=measured: what trial cuts cost the model decides what each layer gives."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from baselines.micro_experts.magnitude import Magnitude
from camera.calibration import trials
from camera.calibration.statistics import Statistics
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.pipeline.passes.trial import measure
from camera.pruning.allocation import allocate
from camera.pruning.camera_plus import CameraPlus
from camera.runtime.errors import CameraError
from camera.streaming.settings import Memory
from camera.streaming.streamer import Streamer
from tests.helpers.models import FAMILIES


def each_layer(streamer):
    return lambda title, start: range(start, len(streamer.layers))


def trials_of(streamer, shares):
    """Nested random trials."""
    torch.manual_seed(3)
    found = {}
    for i, pool in streamer.budget.layers.items():
        order = torch.randperm(sum(pool.widths))
        found[i] = []
        for share in shares:
            keep_N = torch.ones(len(order), dtype=torch.bool)
            keep_N[order[: int(share * len(order))]] = False
            found[i].append(keep_N)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_costs_what_the_whole_model_diverges_with_it(family, checkpoints):
    source = checkpoints(family)
    streamer = Streamer(source)
    streamer.prepare(Memory(), 32, False, source)
    trials = trials_of(streamer, (0.3, 0.8))
    ids_NL = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    found = measure(streamer, ids_NL, trials, each_layer(streamer))

    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = dense(ids_NL).logits.log_softmax(-1)
        for i, plans in trials.items():
            layer = dense.model.layers[i]
            before = {k: v.clone() for k, v in layer.state_dict().items()}
            for trial, keep_N in enumerate(plans):
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


def test_a_layer_costs_nothing_uncut_and_the_model_is_left_as_it_was(checkpoints):
    source = checkpoints("qwen2_moe")
    streamer = Streamer(source)
    streamer.prepare(Memory(), 32, False, source)
    ids_NL = torch.randint(0, 256, (2, 16))
    trials = trials_of(streamer, (0.0, 1.0))
    first = measure(streamer, ids_NL, trials, each_layer(streamer))
    again = measure(streamer, ids_NL, trials, each_layer(streamer))
    for i in trials:
        assert first[i].cost_C[0].abs() < 1e-4 < first[i].cost_C[1]
        assert torch.equal(first[i].cost_C, again[i].cost_C)


def test_a_process_tries_cuts_on_whole_samples_unless_they_are_long():
    ids_NL = torch.arange(40 * 100).view(40, 100)
    assert trials.trial_tokens(ids_NL, 1).shape == (10, 100)
    assert trials.trial_tokens(ids_NL, 4).shape == (2, 100)
    assert trials.trial_tokens(ids_NL.view(1, -1), 1).shape == (1, trials.TOKENS)


def test_allocation_is_the_cheapest_of_all():
    removed = [[4, 8, 12], [4, 8, 12], [4, 8, 12]]
    cost = [[1.0, 2.5, 9.0], [0.2, 3.0, 8.0], [2.0, 4.0, 6.5]]  # convex: the hull is the curve
    for total in range(0, 37, 4):
        best = min(
            sum(0.0 if n == 0 else cost[layer][n // 4 - 1] for layer, n in enumerate(counts))
            for counts in itertools.product((0, 4, 8, 12), repeat=3)
            if sum(counts) == total
        )
        gone = allocate(removed, cost, total, unit=4)
        assert sum(gone) == total
        assert sum(0.0 if n == 0 else cost[i][n // 4 - 1] for i, n in enumerate(gone)) == best


def test_allocation_gives_what_is_asked_and_never_more_than_was_tried():
    torch.manual_seed(0)
    removed = [sorted(torch.randperm(500)[:4].add(1).tolist()) for _ in range(6)]
    cost = [torch.rand(4).cumsum(0).tolist() for _ in range(6)]
    limit = sum(counts[-1] for counts in removed)
    for total in (0, 1, limit // 3, limit - 1, limit):
        gone = allocate(removed, cost, total)
        assert sum(gone) == total
        assert all(0 <= n <= counts[-1] for n, counts in zip(gone, removed, strict=True))


def test_a_trial_that_costs_less_than_a_smaller_one_is_no_reason_to_cut_more():
    assert allocate([[5, 10, 15]] * 2, [[1.0, 3.0, 2.0], [0.75, 1.5, 4.0]], 10, 5) == [0, 10]


def test_what_any_cut_of_a_layer_costs_is_no_reason_to_spare_it():
    removed, cost = [[10, 20, 30]] * 2, [[1.0, 2.0, 4.0], [2.0, 4.0, 6.0]]
    rerouted = [[3.0 + c for c in cost[0]], cost[1]]
    for total in (10, 25, 40):
        assert allocate(removed, rerouted, total) == allocate(removed, cost, total)


def test_a_layer_that_may_lose_nothing_gives_nothing():
    assert allocate([[0, 0], [5, 10]], [[0.0, 0.0], [1.0, 2.0]], 7) == [0, 7]


def run(source, out, calibration, data, sparsity=0.4, **settings):
    method = CameraPlus(sparsity=sparsity, score="hidden_share", rank_scope="measured")
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
    monkeypatch.setattr(trials, "measure", None)
    run(source, tmp_path / "b", calibration, data_folder, statistics=statistics, sparsity=0.6)


def test_trial_cuts_are_refused_where_experts_stay_on_disk(
    checkpoints, calibration, data_folder, tmp_path
):
    method = CameraPlus(sparsity=0.4, score="hidden_share", rank_scope="measured", compensate="none")
    options = dict(calibration=calibration, data=data_folder, memory=Memory(experts="visit"))
    with pytest.raises(CameraError, match=r"set memory\.experts=layer"):
        camera.compress(checkpoints("qwen2_moe"), method, tmp_path / "out", **options)


def test_trial_cuts_are_refused_for_a_method_that_reads_no_text(checkpoints, tmp_path):
    with pytest.raises(CameraError, match="measured tries cuts on calibration text"):
        camera.compress(
            checkpoints("qwen2_moe"), Magnitude(sparsity=0.4, rank_scope="measured"), tmp_path / "o"
        )
