"""Costs counted from a config are those of a real run, and of the models that are published."""

import argparse
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import camera
from camera.calibration.statistics import Statistics
from camera.checkpoint.formats import ragged
from camera.compensation import least_squares
from camera.compensation.expert_regression import ExpertRegression
from camera.compensation.least_squares import refit
from camera.compensation.settings import CompensationSettings
from camera.pipeline.memory.config_model import ConfigModel
from camera.pipeline.time.cards import BANDWIDTH_SHARE, LAUNCH_SECONDS, WAIT_SECONDS, Card
from camera.pipeline.time.costs import LayerCost, RunCost, run_cost
from camera.pipeline.time.traffic import LayerTraffic, Ways
from camera.runtime.errors import CameraError
from camera.runtime.files import CheckpointFiles
from camera.streaming.memory import BATCH_TOKENS
from camera.streaming.settings import MemoryChoices
from experiments.bench import roofline
from experiments.bench.support.architectures import ARCHITECTURES
from experiments.bench.support.refit import fit_flops

SAMPLES, LENGTH, SPARSITY = 8, 64, 0.4
FLOPS_OF = ("qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v2", "llama")


def product_flops(_, left, right, **__):
    """FLOPs of a product that is added in place, by its factors' shapes: torch doesn't count it."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: product_flops}


@pytest.fixture(scope="module")
def real_run(checkpoints, data_folder, tmp_path_factory):
    """real_run(family, phi): FLOPs of a run, and the share that stays of what its tokens visit."""

    def run(family: str, phi: str) -> tuple[int, float]:
        out = tmp_path_factory.mktemp(family) / "out"
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = camera.compress(
                checkpoints(family),
                "camera_p",
                out,
                sparsity=SPARSITY,
                calibration=camera.Calibration(source="wikitext2", samples=SAMPLES, length=LENGTH),
                data=str(data_folder),
                memory=MemoryChoices(phi=phi),
                device="cpu",
                progress=False,
            )
        visited = stayed = 0
        for layer in Statistics.load(out / CheckpointFiles.STATISTICS).layers.values():
            kept = [width for path in layer.groups for width in result.widths[path]]
            visited += layer.tokens_E @ torch.tensor(layer.widths)
            stayed += layer.tokens_E @ torch.tensor(kept)
        return counter.get_total_flops(), float(stayed / visited)

    return run


@pytest.mark.parametrize(
    ("family", "phi"),
    [
        *((family, phi) for family in FLOPS_OF for phi in ("keep", "recompute")),
        ("qwen2_moe", "routed"),
    ],
)
def test_flops_are_those_of_a_real_run(family, phi, checkpoints, real_run, monkeypatch):
    # layers as small as these would run all experts at once: more FLOPs in less time
    monkeypatch.setattr(ragged, "LOOP_STEP", 0)
    measured, still_used = real_run(family, phi)
    kept = {"keep": "all", "routed": "routed", "recompute": "none"}[phi]
    options = {"sparsity": SPARSITY, "ways": Ways(kept), "dtype": torch.float32}
    config = AutoConfig.from_pretrained(checkpoints(family))
    exact = run_cost(config, SAMPLES * LENGTH, LENGTH, still_used=still_used, **options)
    # the shared expert's own share, where it alone runs again, isn't told
    assert exact.total("flops") == pytest.approx(measured, rel=0.05 if phi == "routed" else 0.01)
    if phi == "keep":  # without knowing which experts were pruned
        assert run_cost(config, SAMPLES * LENGTH, LENGTH, **options).total(
            "flops"
        ) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek_moe_16b", 16.4),
        ("deepseek_v2_lite", 15.7),
        ("deepseek_v3", 671.0),
        ("granite_3_1b_a400m", 1.33),
        ("mixtral_8x7b", 46.7),
        ("olmoe_1b_7b", 6.92),
        ("phi35_moe", 41.9),
        ("qwen2_57b_a14b", 57.4),
        ("qwen3_30b_a3b", 30.5),
    ],
)
def test_published_models_have_the_parameters_they_are_named_after(name, billions):
    known = dict(ARCHITECTURES[name])
    config = AutoConfig.for_model(known.pop("model_type"), **known)
    cost = run_cost(config, 4096, 2048, sparsity=0.2)
    assert cost.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    each = 1e9 if "quantization_config" in known else 2e9
    assert cost.total("bytes_read") + cost.bytes_rest == pytest.approx(each * billions, rel=0.01)


def test_the_largest_model_fits_a_card_of_80_gb_with_its_experts_on_disk():
    """DeepSeek-V3 of 671 billion parameters: latent attention by hand, and the memory's parts."""
    config, tokens, length = roofline.config_of("deepseek_v3"), 4096, 2048
    model = ConfigModel(config, torch.bfloat16)
    said = model.memory(tokens, length, 0.2, 80 * 10**9, 256 * 10**9)
    assert said.experts_on_disk and said.peak < 72e9
    kept = 0.8 * 256 * 3 * 7168 * 2048 * 2
    assert kept < said.device.layers < kept + 3e9

    def costs(tokens: int) -> list[RunCost]:
        ways = [Ways(experts_on_disk=there) for there in (False, True)]
        return [run_cost(config, tokens, length, sparsity=0.2, ways=way) for way in ways]

    ram, disk = costs(tokens)
    again = 58 * 256 * 3 * 7168 * 2048  # routed experts, once more, a byte each
    assert disk.total("bytes_read") - ram.total("bytes_read") == pytest.approx(again, rel=0.001)
    many_ram, many_disk = costs(4 * BATCH_TOKENS)
    assert many_disk.moved("launches") > 2 * many_ram.moved("launches")  # one by one
    latent = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    products = 2 * tokens * (latent + length * 128 * (192 + 128))
    assert ram.layers[-1].attention == pytest.approx(products, rel=1e-6)


def test_what_is_removed_is_not_written_nor_computed():
    config = roofline.config_of("qwen3_30b_a3b")
    dense, half = (run_cost(config, 4096, 2048, sparsity=s) for s in (0.0, 0.5))
    pool = 48 * 128 * 3 * 2048 * 768
    removed = dense.total("bytes_written") - half.total("bytes_written")
    assert removed == pytest.approx(2 * pool / 2, rel=1e-6)
    assert half.total("down") == dense.total("down") / 2
    assert half.total("gate_up") == dense.total("gate_up")
    assert dense.total("everywhere") == dense.total("gate_up") * 128 / 8


def test_time_is_that_of_what_binds():
    layer = LayerCost(
        attention=10, router=10, gate_up=40, down=40, everywhere=0,
        bytes_read=30, bytes_written=20, bytes_resume=7,
        traffic=LayerTraffic(elementwise=60, up=5, down=40, launches=1000, waits=3),
    )  # fmt: skip
    cost = RunCost([layer] * 4, bytes_rest=5, parameters=1)
    fast, none = 1e15, pytest.approx(0, abs=1e-6)

    def spent(flops=fast, bandwidth=fast, link=fast):
        return cost.seconds(Card(flops, fast, bandwidth, link, 1), efficiency=0.5, disk=2.0)

    asking, waiting = 4 * 1000 * LAUNCH_SECONDS, 4 * 3 * WAIT_SECONDS
    assert spent().disk == pytest.approx((4 * (30 + 20 + 7) + 2 * 5) / 2.0)
    assert spent().total == pytest.approx(asking + waiting)
    # what computes longer hides that it is asked for
    multiplying = spent(flops=1.0)
    assert multiplying.products == pytest.approx(4 * 100 / 0.5) and multiplying.launches == none
    moving = spent(bandwidth=1.0)
    assert moving.elementwise == pytest.approx(4 * 60 / BANDWIDTH_SHARE)
    assert moving.total == pytest.approx(moving.elementwise + waiting)
    # the longer way of a layer, where it outlasts asking; the first and the last are waited for
    ends = 30 + 20 + 2 * 5
    assert spent(link=1.0).copies == pytest.approx(4 * (20 + 40) - asking + ends)
    both = spent(flops=1.0, link=1.0)
    assert both.copies == pytest.approx(ends) and both.products == multiplying.products


@pytest.mark.parametrize(
    ("card", "phi"),
    [("a100_40gb", "routed"), ("a100_80gb", "keep"), ("rtx_4090", "recompute")],
)
def test_a_card_decides_what_is_kept_on_it(card, phi, monkeypatch):
    monkeypatch.setattr("camera.pipeline.memory.estimate.free_host_memory", lambda: 10**11)
    spent = ran("qwen2_57b_a14b", card)["devices"][card]
    assert (spent["phi"], spent["hidden"]) == (phi, "device")
    assert spent["gigabytes"]["to_device"] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("at_once", [True, False])
def test_flops_of_a_refit_are_those_counted(at_once, checkpoints, monkeypatch):
    monkeypatch.setattr(least_squares, "AT_ONCE", 4096 if at_once else 0)
    config = AutoConfig.from_pretrained(checkpoints("qwen3_moe"))
    layers, experts, top_k = (
        config.num_hidden_layers,
        config.num_experts,
        config.num_experts_per_tok,
    )
    hidden, width, kept = config.hidden_size, config.moe_intermediate_size, 5
    tokens, sweeps, held_out = 4 * experts, 1, 0.25
    generator = torch.Generator().manual_seed(0)
    each = tokens * top_k // experts
    blocks = [
        ExpertRegression(
            torch.arange(each) * tokens // each,
            torch.randn(each, kept, generator=generator),
            torch.randn(kept, hidden, generator=generator),
        )
        for _ in range(experts)
    ]
    residual_TH = torch.zeros(tokens, hidden)
    for block in blocks:
        residual_TH[block.tokens_N] += block.phi_NW @ block.old_WH
    how = CompensationSettings(ridges=(100.0,), sweeps=sweeps, held_out=held_out)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        found = refit(blocks, residual_TH, round(tokens * (1 - held_out)), how)
    assert (found.ridge, found.sweeps) == (100.0, sweeps)
    # the counter sees no solving, nor what was before the fit
    blocks, size = (1, experts * kept) if at_once else (experts, kept)
    solving = blocks * (2 * size**3 / 3 + 2 * sweeps * 2 * size**2 * hidden)
    lost = 2 * tokens * top_k * (width - kept) * hidden
    unseen = solving + lost
    options = {"ridges": 1, "sweeps": sweeps, "held_out": held_out}
    counted = fit_flops(config, tokens, sparsity=1 - kept / width, **options)
    assert counted == pytest.approx(layers * (counter.get_total_flops() + unseen), rel=0.01)


def test_refitting_attention_is_one_fit_of_all_its_heads(checkpoints):
    config = AutoConfig.from_pretrained(checkpoints("deepseek_v2"))
    options = dict(sparsity=0.4, ridges=1, sweeps=3, held_out=0.25)
    tokens, hidden, layers = 4096, config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads * config.v_head_dim
    fitted = tokens * 3 // 4
    block = ExpertRegression(None, torch.randn(tokens, heads), torch.randn(heads, hidden))
    residual_TH = block.phi_NW @ block.old_WH
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        found = refit(
            [block], residual_TH, fitted, CompensationSettings(ridges=[100.0], held_out=0.25)
        )
    assert found.ridge == 100.0
    without, counted = (fit_flops(config, tokens, attention=a, **options) for a in (False, True))
    solving = 2 * (heads**3 / 3 + 2 * heads**2 * hidden)
    expected = layers * (counter.get_total_flops() + solving)
    assert counted - without == pytest.approx(expected, rel=0.01)


def ran(model: str, card: str) -> dict:
    """What the benchmark says; it is one line of JSON."""
    parser = argparse.ArgumentParser()
    roofline.arguments(parser)
    return json.loads(
        json.dumps(roofline.run(parser.parse_args(["--model", model, "--device", card])))
    )


def test_the_bench_compares_with_the_dense_way():
    found = ran("qwen3_30b_a3b", "a100_40gb")
    spent = found["devices"]["a100_40gb"]
    assert spent["times_fewer"] > 4
    assert spent["parts"]["products"] < spent["seconds"] < spent["dense_way_seconds"]
    parts = [took for part, took in spent["parts"].items() if part != "disk"]
    assert sum(parts) == pytest.approx(spent["seconds"], abs=0.3)
    rate = 0.4 * 19.5e12
    assert spent["compensation_seconds"] == pytest.approx(
        found["compensation_tflops"] * 1e12 / rate, abs=0.1
    )


def test_a_model_can_be_a_folder_or_a_file(checkpoints):
    folder = checkpoints("olmoe")
    for path in (folder, folder / "config.json"):
        assert roofline.config_of(str(path)).model_type == "olmoe"
    assert roofline.config_of("tiny_moe").num_experts == 6


def test_unknown_models_and_devices_are_refused():
    with pytest.raises(CameraError, match="--model nothing is neither"):
        roofline.config_of("nothing")
    with pytest.raises(CameraError, match=r"--device tpu is none of a100_40gb, .*, cpu"):
        roofline.device_of("tpu")
