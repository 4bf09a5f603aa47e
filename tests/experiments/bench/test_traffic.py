"""What the cost model says of a run beside its products is what is counted on the fake device."""

from pathlib import Path

import pytest
import torch

import camera
from camera.calibration.statistics import Statistics
from camera.pipeline.time.costs import run_cost
from camera.pipeline.time.traffic import Ways
from camera.runtime.files import CheckpointFiles
from camera.streaming.settings import MemoryChoices
from tests.fake_device.counts import counting
from tests.helpers.machine.elementwise import ElementwiseBytes
from tests.helpers.models import build_model, build_tokenizer

SAMPLES, LENGTH, SPARSITY, BATCHES = 16, 64, 0.2, 2
OUTSIDE_LAYERS = 20  # waits of a run: embeddings, head, checks, what is known of super experts
SIZES = dict(num_hidden_layers=3, hidden_size=96, moe_intermediate_size=80, num_experts_per_tok=3)
FAMILIES = {
    "qwen2_moe": dict(num_experts=12, shared_expert_intermediate_size=160),
    "qwen3_moe": dict(num_experts=12, head_dim=32),
    "deepseek": dict(n_routed_experts=12, n_shared_experts=2),
}
KEPT = {"keep": "all", "routed": "routed", "recompute": "none"}
CASES = [
    ("qwen2_moe", "keep", "device"),
    ("qwen2_moe", "routed", "device"),
    ("qwen2_moe", "recompute", "device"),
    ("qwen3_moe", "keep", "device"),
    ("qwen3_moe", "recompute", "ram"),
    ("deepseek", "keep", "device"),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def run(request, fake, data_folder, tmp_path_factory):
    """(said, counted on the device, bytes of elementwise kernels) of a run of Camera-P."""
    family, phi, hidden = request.param
    folder = tmp_path_factory.mktemp(family)
    model = build_model(family, dtype=torch.bfloat16, **SIZES, **FAMILIES[family])
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    elementwise, batch = ElementwiseBytes(fake), SAMPLES * LENGTH // BATCHES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("camera.pipeline.passes.dense.BATCH_TOKENS", batch)
        # experts one by one, as where each has many rows
        patch.setattr("camera.moe.grouped.products.FILLING_LAUNCHES", 1e9)
        with elementwise, counting(Path(camera.__file__).parent) as counts:
            result = camera.compress(
                folder,
                "camera_p",
                folder / "out",
                sparsity=SPARSITY,
                device=fake,
                data=str(data_folder),
                memory=MemoryChoices(phi=phi, hidden=hidden),
                calibration=camera.Calibration(samples=SAMPLES, length=LENGTH),
                progress=False,
            )
    said = run_cost(
        model.config,
        SAMPLES * LENGTH,
        LENGTH,
        sparsity=SPARSITY,
        still_used=still_used(folder / "out", result.widths),
        ways=Ways(KEPT[phi], hidden == "device", compiled=False),
        batch=batch,
    )
    return said, counts, elementwise.total


def still_used(out: Path, widths: dict[str, list[int]]) -> float:
    """The share that stays of the micro-experts that tokens visit."""
    visited = stayed = 0
    for layer in Statistics.load(out / CheckpointFiles.STATISTICS).layers.values():
        kept = [width for path in layer.groups for width in widths[path]]
        visited += layer.tokens_E @ torch.tensor(layer.widths)
        stayed += layer.tokens_E @ torch.tensor(kept)
    return float(stayed / visited)


def test_elementwise_kernels_move_as_many_bytes_as_said(run):
    said, _, moved = run
    assert said.moved("elementwise") == pytest.approx(moved, rel=0.05)


def test_operators_are_launched_and_waited_for_as_often_as_said(run):
    said, counts, _ = run
    assert said.moved("launches") == pytest.approx(counts.times("launch"), rel=0.1)
    assert 0 <= counts.times("wait") - said.moved("waits") <= OUTSIDE_LAYERS


def test_as_many_bytes_cross_each_way_as_said(run):
    said, counts, _ = run
    up = said.total("bytes_read") + said.moved("up") + said.bytes_rest
    down = said.total("bytes_written") + said.moved("down") + said.bytes_rest
    assert up == pytest.approx(counts.bytes("h2d"), rel=0.05)
    assert down == pytest.approx(counts.bytes("d2h"), rel=0.06)  # embedded tokens too, once
