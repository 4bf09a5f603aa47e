"""Speed against the original: what is compared, how turns are taken, and what is reported."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from camera.checkpoint.loading import load_model
from camera.evaluation.speed import measure_speed
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.pool import rows_of_mask
from camera.pruning.slicing import slice_layer
from camera.runtime.errors import CameraError
from tests.helpers.models import build_model


class Clock:
    """A clock that only models move on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Experts(nn.Module):
    has_gate, is_transposed = True, False

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(8, 2, 4))


class Timed(nn.Module):
    """A model that takes `prefill` seconds for a prompt and `decode` for a token, by `costs`."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, clock: Clock, costs: dict[str | None, tuple[float, float]], log: list):
        super().__init__()
        self.clock, self.costs, self.log = clock, costs, log
        self.config = SimpleNamespace(
            model_type="olmoe", num_experts_per_tok=2, _experts_implementation=None
        )
        if None not in costs:
            self.experts, self.config._experts_implementation = Experts(), "grouped_mm"

    def set_experts_implementation(self, name: str) -> None:
        self.config._experts_implementation = name

    def forward(self, ids_BL, past_key_values=None, use_cache=True, logits_to_keep=0):
        assert use_cache and (past_key_values is not None) == (ids_BL.shape[1] == 1)
        assert (logits_to_keep == 1) == (past_key_values is None)
        prefill, decode = self.costs[self.config._experts_implementation]
        self.clock.now += prefill if past_key_values is None else decode
        self.log.append((self, self.config._experts_implementation, ids_BL))
        return SimpleNamespace(past_key_values="cache")


@pytest.fixture
def clock() -> Clock:
    return Clock()


NATIVE = {"grouped_mm": (1.0, 0.4), "batched_mm": (90.0, 0.2), "eager": (2.0, 0.8)}


def measure(clock: Clock, log: list, fast=(0.5, 0.1), native=NATIVE, **options):
    dense, compressed = Timed(clock, native, log), Timed(clock, {None: fast}, log)
    options = {"batch_sizes": (1,), "prompt_length": 6, "new_tokens": 4, "repeats": 3} | options
    return dense, compressed, measure_speed(dense, compressed, 50, **options, clock=clock)


def test_rates_are_tokens_of_all_prompts_per_second(clock):
    *_, found = measure(clock, [], batch_sizes=(1, 3))
    one, three = found["batches"]["1"], found["batches"]["3"]
    assert (one["prefill"]["dense"], one["prefill"]["compressed"]) == (6 / 1.0, 6 / 0.5)
    assert (one["decode"]["dense"], one["decode"]["compressed"]) == (1 / 0.2, 1 / 0.1)
    assert three["decode"]["compressed"] == pytest.approx(3 / 0.1)
    assert one["prefill"]["ratio"] == 2 and one["decode"]["ratio"] == 2


def test_the_original_runs_in_the_best_way_for_each_phase(clock):
    *_, found = measure(clock, [])
    ways = {phase: row["implementation"] for phase, row in found["batches"]["1"].items()}
    assert ways == {"prefill": "grouped_mm", "decode": "batched_mm"}


def test_prompts_are_never_read_by_copying_an_expert_for_each_token(clock):
    log = []
    measure(clock, log)
    assert not any(way == "batched_mm" and ids.shape[1] > 1 for _, way, ids in log)


def test_tokens_that_would_copy_more_than_all_experts_are_not_decoded_so(clock):
    log = []
    *_, found = measure(clock, log, batch_sizes=(5,))
    assert found["batches"]["5"]["decode"]["implementation"] == "grouped_mm"
    assert not any(way == "batched_mm" for _, way, _ in log)


def test_ways_far_from_the_best_are_not_repeated(clock):
    log = []
    measure(clock, log, repeats=9)
    assert sum(way == "eager" for _, way, _ in log) == 2 * (1 + 4)


def test_both_read_the_same_tokens_and_take_turns(clock):
    log = []
    dense, compressed, _ = measure(clock, log, native={**NATIVE, "batched_mm": (9, 9)}, repeats=4)
    turns = [model for model, _, ids in log if ids.shape[1] > 1][-8:]
    assert turns == [dense, compressed, compressed, dense] * 2
    read = {m: [ids for n, _, ids in log if n is m][-5:] for m in (dense, compressed)}
    for left, right in zip(*read.values(), strict=True):
        assert torch.equal(left, right)


def test_a_slow_moment_of_the_machine_does_not_count(clock):
    class Jumpy(Timed):
        def forward(self, ids_BL, past_key_values=None, use_cache=True, logits_to_keep=0):
            clock.now += 100 if len(log) in (30, 31) else 0
            return super().forward(ids_BL, past_key_values, use_cache, logits_to_keep)

    log = []
    compressed = Jumpy(clock, {None: (0.5, 0.1)}, log)
    found = measure_speed(
        Timed(clock, {None: (1.0, 0.2)}, log), compressed, 50, (1,), 6, 4, 5, clock
    )
    assert [found["batches"]["1"][p]["ratio"] for p in ("prefill", "decode")] == [2, 2]


def test_models_keep_the_implementation_they_came_with(clock):
    dense, *_ = measure(clock, [])
    assert dense.config._experts_implementation == "grouped_mm"


def test_a_text_is_read_in_its_order_and_again_from_its_start(clock):
    log = []
    model = Timed(clock, {None: (1, 1)}, log)
    measure_speed(model, model, torch.arange(100, 107), (2,), 3, 1, 1)
    assert log[0][2].tolist() == [[100, 101, 102], [104, 105, 106]]
    assert log[1][2].tolist() == [[103], [100]]


@pytest.mark.parametrize("key", ["prompt_length", "new_tokens", "repeats"])
def test_counts_below_one_are_refused(clock, key):
    with pytest.raises(CameraError, match=f"evaluation.speed.{key}=0"):
        measure(clock, [], **{key: 0})
    with pytest.raises(CameraError, match=r"evaluation\.speed\.batch_sizes=0"):
        measure(clock, [], batch_sizes=(4, 0))


def test_a_real_model_against_its_cut_self():
    dense, cut = build_model("qwen2_moe"), build_model("qwen2_moe")
    cut.requires_grad_(False)
    for i, layer in enumerate(cut.model.layers):
        ffn = FeedForward(layer, family_of("qwen2_moe"), f"model.layers.{i}")
        slice_layer(ffn, rows_of_mask(ffn, torch.arange(sum(ffn.widths)) % 3 > 0))
    found = measure_speed(dense, cut, 256, (1, 2), prompt_length=8, new_tokens=2, repeats=1)
    assert json.loads(json.dumps(found)) == found
    for row in (row for phases in found["batches"].values() for row in phases.values()):
        assert row["implementation"] in ("grouped_mm", "batched_mm", "eager")
        assert row["ratio"] == pytest.approx(row["compressed"] / row["dense"], rel=1e-2)
    assert found["settings"]["device"] == "cpu" and found["settings"]["dtype"] == "float32"


def test_odd_widths_run_one_by_one(checkpoints):
    """torch's grouped product takes rows of whole 16 bytes only."""
    folder = checkpoints("qwen3_moe", num_experts=7, moe_intermediate_size=13)
    dense = load_model(folder, device="cpu")
    found = measure_speed(dense, dense, 256, [1], prompt_length=8, new_tokens=2, repeats=1)
    assert found["batches"]["1"]["prefill"]["implementation"] == "eager"
