"""A run takes the memory it says it takes: a few layers and the hidden states, on disk or not."""

import json
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

import camera
from camera.calibration.trials import trial_bytes
from camera.method import METHODS
from camera.moe.pool import LayerShape
from camera.pipeline.memory.estimate import LAYERS_HELD, MemoryEstimate
from camera.streaming.memory import HIDDEN_HELD
from camera.streaming.settings import MemoryChoices
from camera.streaming.skeleton import MetaModel
from tests.helpers.models import build_model, build_tokenizer

# A process of its own compresses tiny models first, so that the libraries' own memory is there, and
# prints what each of the others took beyond what was held when its memory was estimated. From the
# job `exact` on, malloc gives every tensor a mapping of its own, as it always does with those of a
# real model's size: else it keeps pieces of these small ones, more or fewer as threads are
# scheduled, up to a third of what a job takes.
MEASURED = textwrap.dedent("""
    import ctypes, gc, json, sys
    import torch
    import camera
    from camera.pipeline.memory.estimate import MemoryEstimate
    from camera.runtime.buffers import trim_heap
    from camera.streaming.settings import MemoryChoices

    torch.set_num_threads(1)
    M_MMAP_THRESHOLD = -3  # glibc's
    of, found = MemoryEstimate.of, {}

    def status(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    def measured(*args, **options):
        estimate = of(*args, **options)
        trim_heap()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        found.update(estimate=estimate, before=status("VmRSS"))
        return estimate

    MemoryEstimate.of = measured
    data, *jobs = sys.argv[1:]
    for job in map(json.loads, jobs):
        if job["exact"]:
            getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(M_MMAP_THRESHOLD, 2**20)
        result = camera.compress(
            job["model"], job["method"], job["out"], memory=MemoryChoices(**job["memory"]),
            data=data, device="cpu", progress=False,
            calibration=camera.Calibration(samples=job["samples"], length=128), **job["settings"],
        )
        estimate, took = found["estimate"], status("VmHWM") - found["before"]
        print(json.dumps(vars(estimate) | {
            "took": took, "said": estimate.peak, "before": found["before"],
            "peak": result.peak_memory_bytes, "expected": result.expected_memory_bytes,
        }))
        gc.collect()
""")
PIECES = 1.1  # of what is said: what malloc, and the threads that read and write, may add to it
MEASURABLE = Path("/proc/self/clear_refs").exists()


def large(folder, family="qwen2_moe", dtype=torch.bfloat16, **overrides):
    build_model(family, dtype=dtype, **overrides).save_pretrained(folder, max_shard_size="40MB")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def took(checkpoints, data_folder, tmp_path_factory):
    """What compressing takes: a deep model (eight layers of 50 MB, as they are computed), a wide
    one (a layer of 200 MB, nearly all of it experts) whose experts stay on disk, a small one
    quantised, one of dense FFNs compensated on many tokens, one of many words pruned by gradients,
    one by trials."""
    if not MEASURABLE:
        pytest.skip("peak memory is read from Linux's /proc")
    folder = tmp_path_factory.mktemp("measured")
    common = dict(num_attention_heads=8, num_key_value_heads=4)
    deep = dict(hidden_size=512, moe_intermediate_size=256, shared_expert_intermediate_size=256)
    wide = dict(hidden_size=256, moe_intermediate_size=512, shared_expert_intermediate_size=64)
    plain = dict(hidden_size=128, intermediate_size=512, dtype=torch.float32)
    models = {
        "plain": large(folder / "plain", "llama", num_hidden_layers=2, **plain),
        "worded": large(folder / "worded", "llama", vocab_size=2**15, **plain),
        "deep": large(folder / "deep", num_hidden_layers=8, num_experts=30, **common, **deep),
        "wide": large(folder / "wide", num_hidden_layers=1, num_experts=128, **common, **wide),
        "small": large(folder / "small", num_hidden_layers=1, num_experts=32, **common, **wide),
        "tiny": checkpoints("qwen2_moe"),
    }
    pruned, quantised = ("camera_p", {"sparsity": 0.3}), ("camera_q", {"bits": 3.0})
    refitted = ("camera_p", {"sparsity": 0.3, "compensate": "layer", "target": "dense"})
    on_disk, jobs = {"experts": "disk"}, {}
    for name, model, (method, settings), asked in (
        ("first", "tiny", pruned, {}),
        ("second", "tiny", quantised, on_disk),
        ("deep", "deep", pruned, {}),
        ("on disk", "wide", ("camera_p", {"sparsity": 0.75}), on_disk),
        ("quantised", "small", quantised, {}),
        ("compensated", "plain", refitted, {}),
        ("gradients", "worded", ("heapr", {"sparsity": 0.3}), {}),
        ("trials", "worded", ("camera_p", {"sparsity": 0.3, "rank_scope": "measured"}), {}),
    ):
        job = {"model": models[model], "out": folder / f"{name}-out", "method": method}
        job["samples"] = {"compensated": 256, "gradients": 64, "trials": 64}.get(name, 4)
        job |= {"settings": settings, "memory": asked}
        job["exact"] = name not in ("first", "second", "deep")
        jobs[name] = json.dumps(job, default=str)
    script = folder / "measured.py"
    script.write_text(MEASURED)
    done = subprocess.run(
        [sys.executable, script, data_folder, *jobs.values()],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


def is_said(facts) -> bool:
    """Whether what a job took was said, and not much more."""
    return facts["took"] / PIECES <= facts["said"] <= 2 * facts["took"]


def test_a_deep_model_takes_three_layers_and_its_hidden_states(took):
    facts = took["deep"]
    assert facts["layer"] > 45e6
    # a fourth layer would be a third more
    assert facts["took"] <= PIECES * (3 * facts["layer"] + HIDDEN_HELD * facts["hidden"])
    assert is_said(facts)
    # the same comparison as it stands in the report, of the whole process
    assert facts["peak"] <= facts["expected"] < facts["before"] + 1.1 * facts["said"]


def test_what_a_quantiser_takes_is_in_the_estimate(took):
    facts = took["quantised"]
    assert facts["method"] > facts["layer"]  # Hessians, factors: without them a third were said
    assert is_said(facts)


def test_what_a_fit_takes_is_in_the_estimate(took):
    facts = took["compensated"]
    assert facts["phi"] > 64e6 > 10 * facts["layer"]  # without the fit half of it were said
    assert is_said(facts)


@pytest.mark.parametrize("name", ["gradients", "trials"])
def test_what_the_head_takes_is_in_the_estimate(name, took):
    facts = took[name]
    assert facts["logits"] > 500e6 > 10 * facts["hidden"]  # without them a fifth were said
    assert is_said(facts)


def test_experts_on_disk_take_far_less_than_the_layer(took):
    facts = took["on disk"]
    assert facts["experts_on_disk"] and facts["layer"] > 190e6
    # a third of the layer is measured; all its experts would be nearly all of it
    assert facts["took"] <= 0.6 * facts["layer"]
    assert facts["took"] <= facts["said"] <= LAYERS_HELD * facts["layer"] / 2


def test_the_estimate_is_logged_before_and_the_fact_after(
    checkpoints, data_folder, calibration, tmp_path, caplog
):
    with caplog.at_level("INFO", "camera"):
        result = camera.compress(
            checkpoints("qwen2_moe"),
            "camera_p",
            tmp_path / "out",
            sparsity=0.3,
            calibration=calibration,
            data=str(data_folder),
            device="cpu",
            progress=False,
        )
    said = [record.message for record in caplog.records if record.message.startswith("out: this")]
    assert len(said) == 2
    assert re.search(
        r"this takes about \d+\.\d\d MB on top of the process itself \(largest layer", said[0]
    )
    assert re.search(r"this took \d+(\.\d+)? (MB|kB|bytes) on top of the process itself$", said[1])
    assert 0 < result.expected_memory_bytes < 2 * result.peak_memory_bytes


TOKENS = 4096
PRUNED = camera.CameraP(sparsity=0.3)


@pytest.fixture
def decide(checkpoints):
    """decide(family, tokens, method, **memory): what is decided of a tiny model."""

    def go(family="qwen2_moe", tokens=TOKENS, method=PRUNED, **choices):
        model, memory = MetaModel(checkpoints(family)), MemoryChoices(**choices)
        passes = method.passes(model.budget, "compressed")
        return MemoryEstimate.of(model, method, passes, memory, tokens)

    return go


def test_the_estimate_counts_the_model(decide, checkpoints):
    found = decide()
    model = build_model("qwen2_moe")
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    experts = sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters())
    whole = sum(p.numel() for p in model.parameters())
    assert (found.layer, found.experts) == (4 * layer, 4 * experts)
    assert found.outside == 4 * (whole - 3 * layer)
    assert found.hidden == 4 * TOKENS * 32
    assert found.phi == 4 * TOKENS * (3 * 24 + 40)  # three routed experts of a token, one shared
    assert decide("llama").experts == 0 and decide("llama").phi == 4 * TOKENS * 64


def test_the_largest_layer_counts_where_they_differ(decide):
    assert decide("deepseek").layer > 4 * 3 * 32 * 64  # not the first, which is dense
    assert decide("deepseek").experts > 0


def test_phi_is_kept_where_it_is_small_and_serves(decide, monkeypatch):
    assert decide().phi_kept == "all" and decide(phi="recompute").phi_kept == "none"
    quantised = camera.CameraQ(bits=2.9, group_size=16)
    assert not quantised.slices  # other columns than were seen
    for nothing in (dict(method=quantised), dict(experts="disk"), dict(tokens=0)):
        for phi in ("keep", "routed"):
            assert decide(phi=phi, **nothing).phi_kept == "none"
    monkeypatch.setattr("camera.pipeline.memory.estimate.PHI_LIMIT", 1000)
    assert decide().phi_kept == "none" and decide(phi="keep").phi_kept == "all"


def test_phi_of_routed_experts_alone_is_kept_where_all_of_it_has_no_room(decide, monkeypatch):
    whole = decide()
    assert whole.phi_routed == 4 * TOKENS * 3 * 24 < whole.phi
    for limit, kept in ((whole.phi, "all"), (whole.phi - 1, "routed"), (whole.phi_routed, "routed"),
                        (whole.phi_routed - 1, "none")):  # fmt: skip
        monkeypatch.setattr("camera.pipeline.memory.estimate.PHI_LIMIT", limit)
        found = decide()
        assert found.phi_kept == kept
        assert found.phi_held == {"all": found.phi, "routed": found.phi_routed, "none": 0}[kept]
    monkeypatch.setattr("camera.pipeline.memory.estimate.PHI_LIMIT", 1000)
    assert decide("llama").phi_kept == "none"  # no routed experts: nothing to keep of them


def test_hidden_states_go_to_disk_where_little_is_free(decide, monkeypatch):
    assert not decide().hidden_on_disk and decide(hidden="disk").hidden_on_disk
    free = psutil.virtual_memory()._replace(available=decide().hidden)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert decide().hidden_on_disk and not decide(hidden="ram").hidden_on_disk


def test_experts_stay_on_disk_where_three_layers_fit_no_memory(decide, monkeypatch):
    assert not decide().experts_on_disk and decide(experts="disk").experts_on_disk
    total = 3 * decide().layer
    for size, stay in ((total, False), (total - 1, True)):
        machine = psutil.virtual_memory()._replace(total=size)
        monkeypatch.setattr(psutil, "virtual_memory", lambda machine=machine: machine)
        assert decide().experts_on_disk is stay
        assert not decide(experts="ram").experts_on_disk
        assert not decide("llama").experts_on_disk


def test_what_is_free_now_changes_no_rounding(decide, monkeypatch):
    before = decide()
    free = psutil.virtual_memory()._replace(available=1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert replace(decide(), hidden_place="ram") == before


def test_the_peak_counts_only_what_is_in_memory(decide):
    whole, spilled, on_disk = decide(), decide(hidden="disk"), decide(experts="disk")
    assert whole.peak - spilled.peak == HIDDEN_HELD * whole.hidden
    assert decide(phi="recompute").peak > whole.peak - whole.phi  # the FFN runs instead
    assert on_disk.peak < LAYERS_HELD * on_disk.layer + on_disk.peak - on_disk.experts
    large = replace(whole, outside=100 * whole.layer)
    assert large.peak == 150 * whole.layer  # embeddings and head may be all there is
    assert replace(whole, method=10**9).peak > 10**9


def test_methods_say_what_share_of_a_layer_they_leave(checkpoints):
    budget = MetaModel(checkpoints("qwen2_moe")).budget  # 8 experts of 24, a shared one of 40
    assert PRUNED.share_left(budget) == 1 - int(0.3 * 232) / 232
    assert replace(PRUNED, rank_scope="global").share_left(budget) == 1.0
    assert METHODS["reap"](sparsity=0.3).share_left(budget) == 1 - 2 * 24 / 232
    assert camera.CameraQ(bits=2.9).share_left(budget) == pytest.approx(2.9 / 32)


def test_the_estimate_takes_the_pass_that_needs_the_most(decide, checkpoints):
    """Of statistics, trials and a refit, each counts in the pass in which it is there."""
    refitted, tried = replace(PRUNED, compensate="layer"), replace(PRUNED, rank_scope="measured")
    residual = camera.CameraPlus(sparsity=0.3, score="residual", rank_scope="layer")
    assert decide().method == 0 and decide().logits == 0
    assert decide(method=refitted).method > 0
    model = MetaModel(checkpoints("qwen2_moe"))
    assert decide(method=tried).method == trial_bytes(len(model.layers), 32, 4)
    assert decide(method=tried).logits > 0
    grams = replace(residual, compensate="none", target="layer")
    shape = LayerShape(model.budget.layers[0], 32, 3, TOKENS, 4)
    assert decide(method=grams).method == grams.ranked_by().observer().nbytes(shape)
