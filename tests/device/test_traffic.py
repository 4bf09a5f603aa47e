"""What crosses between host and device, and how often the host waits, counted on the fake."""

from pathlib import Path

import pytest
import torch

import camera
from camera.checkpoint.places import read_places
from camera.checkpoint.shards import ShardReader, write_tensors
from camera.moe.grouped.products import grouped_products, looped_products
from camera.runtime.device.staging import Staging, on_host
from camera.streaming.settings import MemoryChoices
from tests import fake_device
from tests.fake_device import pinned
from tests.fake_device.counts import Counts, counting
from tests.helpers.checkpoints import shards_of
from tests.helpers.models import build_model, build_tokenizer

SAMPLES, LENGTH, HIDDEN = 8, 48, 32
ROWS = 2 * 8 * (8 * 24 + 40)  # row numbers of a layer's micro-experts, to cut and to finish
ROOT = Path(camera.__file__).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(layers, experts): a tiny model in bfloat16."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def go(layers: int, experts: int) -> Path:
        if (layers, experts) not in made:
            folder = root / f"{layers}-{experts}"
            sizes = dict(num_hidden_layers=layers, num_experts=experts)
            build_model("qwen2_moe", dtype=torch.bfloat16, **sizes).save_pretrained(folder)
            build_tokenizer().save_pretrained(folder)
            made[layers, experts] = folder
        return made[layers, experts]

    return go


@pytest.fixture(scope="module")
def pruned(models, fake, data_folder, tmp_path_factory):
    """pruned(layers, batches, experts, **memory): (checkpoint, counts) of a run of Camera-P."""
    made: dict[tuple, tuple[Path, Counts]] = {}

    def go(layers: int = 2, batches: int = 1, experts: int = 8, **memory: str):
        key = (layers, batches, experts, *memory.items())
        if key not in made:
            out = tmp_path_factory.mktemp("pruned") / "out"
            with pytest.MonkeyPatch.context() as patch:
                size = SAMPLES * LENGTH // batches
                patch.setattr("camera.pipeline.passes.dense.BATCH_TOKENS", size)
                with counting(ROOT) as counts:
                    camera.compress(
                        models(layers, experts),
                        "camera_p",
                        out,
                        sparsity=0.3,
                        device=fake,
                        data=str(data_folder),
                        memory=MemoryChoices(**memory),
                        calibration=camera.Calibration(samples=SAMPLES, length=LENGTH),
                        progress=False,
                    )
            made[key] = out, counts
        return made[key]

    return go


def a_layer(pruned, count, **options) -> float:
    """What one more layer adds to a count."""
    few, many = (count(pruned(layers=layers, **options)[1]) for layers in (2, 4))
    return (many - few) / 2


def waits(counts: Counts) -> int:
    return counts.times("wait") - counts.times("wait", "embed")


@pytest.mark.parametrize("hidden", ["device", "ram"])
def test_the_host_waits_a_few_times_a_layer_and_once_a_batch(hidden, pruned):
    one, four = (a_layer(pruned, waits, batches=n, hidden=hidden) for n in (1, 4))
    assert one <= 14
    assert (four - one) / 3 <= 1  # where rows begin


def test_the_host_waits_no_more_for_more_experts(pruned):
    few, many = (a_layer(pruned, waits, batches=2, experts=n) for n in (8, 16))
    assert few == many


def layer_bytes(folder: Path) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in read_all(folder).items()
        if ".layers.0." in name
    )


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return ShardReader(folder).read(lambda _: True)


def test_a_layer_crosses_once_each_way_and_hidden_states_stay(pruned, models):
    table = SAMPLES * LENGTH * HIDDEN * 2
    up, down = (a_layer(pruned, lambda c, k=k: c.bytes(k), batches=2) for k in ("h2d", "d2h"))
    whole, cut = layer_bytes(models(2, 8)), layer_bytes(pruned(batches=2)[0])
    assert whole <= up <= whole + ROWS
    assert cut + table <= down <= 1.1 * (cut + table)  # one table, to go on from
    for kind in ("h2d pageable", "d2h pageable"):
        assert a_layer(pruned, lambda c, k=kind: c.bytes(k), batches=2) < 0.01 * table


def test_what_has_no_room_crosses_once_each_way_from_pinned_memory(pruned, models):
    table, options = SAMPLES * LENGTH * HIDDEN * 2, dict(batches=2, hidden="ram", phi="keep")
    up, down = (a_layer(pruned, lambda c, k=k: c.bytes(k), **options) for k in ("h2d", "d2h"))
    whole, cut = layer_bytes(models(2, 8)), layer_bytes(pruned(batches=2)[0])
    tables = (up - whole) / table  # inputs, FFN's inputs, residuals
    assert 3 <= tables <= 3 + ROWS / table
    assert 3 <= (down - cut) / table <= 3.2  # and the energies, and how many tokens each has
    for kind in ("h2d pageable", "d2h pageable"):
        assert a_layer(pruned, lambda c, k=kind: c.bytes(k), **options) < 0.01 * table


@pytest.mark.parametrize("grouped", [False, True])
def test_launches_for_an_expert_and_a_batch_are_bounded(grouped, pruned, fake):
    """None of a batch's are an expert's own where grouped products are one kernel."""
    if grouped and torch.device(fake).type != "cuda":
        pytest.skip("only a CUDA device tells whether grouped products are one kernel")

    def launches(batches: int, experts: int) -> int:
        # runs of no other test, which are of another card
        own = dict(hidden="disk", phi="keep") if grouped else {}
        return pruned(batches=batches, experts=experts, **own)[1].times("launch")

    devices = torch.accelerator.device_count()
    fake_device.activate(fake, devices, capability=(9, 0) if grouped else (8, 0))
    try:
        more = {n: launches(n, 16) - launches(n, 8) for n in (1, 2)}
    finally:
        fake_device.activate(fake, devices)
    assert (more[2] - more[1]) / (8 * 2) <= (0 if grouped else 4)


def test_launches_of_a_batch_are_as_many_for_more_experts_of_few_rows(pruned):
    """One batched product fills them up, on a card without grouped products too."""
    few, many = (
        [pruned(batches=n, experts=experts)[1].times("launch") for n in (2, 4)]
        for experts in (32, 48)
    )
    assert many[1] - many[0] == few[1] - few[0]


def test_products_by_the_kernel_ask_for_nothing_beside_it(interpreted, fake):
    bounds = [(0, 5), (5, 5), (5, 75)]
    x_RC, weight_ECD = torch.randn(75, 16), torch.randn(3, 16, 24)
    inputs = [part.to(fake) for part in (x_RC, weight_ECD)]
    with counting(ROOT) as counts:
        y_RD = grouped_products(*inputs, bounds)
    assert interpreted.launched == 1 and counts.times("launch") == 0
    expected = looped_products(x_RC, weight_ECD, bounds)
    torch.testing.assert_close(y_RD.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batches", [1, 3])
def test_where_hidden_states_wait_changes_no_byte(batches, pruned):
    kept = [pruned(batches=batches, hidden=place)[0] for place in ("device", "ram", "disk")]
    assert shards_of(kept[0]) == shards_of(kept[1]) == shards_of(kept[2])


def test_bytes_come_through_small_buffers_as_they_were(fake):
    device, source = torch.device(fake), torch.randint(0, 256, (1000,), dtype=torch.uint8)
    read = iter(source.split(1))

    def fill(view: memoryview) -> None:
        for i in range(len(view)):
            view[i] = int(next(read))

    staging = Staging(device, 64)
    parts = [staging.upload(size, fill) for size in (1, 63, 64, 65, 0, 500, 307)]
    assert torch.equal(torch.cat(parts).cpu(), source)
    back = b"".join(bytes(view) for view in Staging(device, 64).download(parts))
    assert back == bytes(source.tolist())


def test_pinned_memory_is_of_a_fixed_size_and_given_back(fake, tmp_path):
    device, before = torch.device(fake), pinned()[0]
    tensors = {str(i): torch.randn(300, 500, device=device).t() for i in range(20)}
    with counting(ROOT) as counts:
        write_tensors(tensors, tmp_path / "model.safetensors")
        found = read_places(ShardReader(tmp_path).places, device)
        torch.accelerator.synchronize(device)
    assert all(torch.equal(found[name].cpu(), tensors[name].cpu()) for name in tensors)
    assert counts.times("pin") == 4 and pinned()[0] <= before
    assert counts.bytes("h2d pageable") == counts.bytes("d2h pageable") == 0


def test_runs_on_the_cpu_pin_nothing(fake, models, data_folder, tmp_path):
    with counting(ROOT) as counts:
        camera.compress(
            models(2, 8),
            "camera_p",
            tmp_path / "out",
            sparsity=0.3,
            device="cpu",
            data=str(data_folder),
            calibration=camera.Calibration(samples=2, length=LENGTH),
            progress=False,
        )
    assert counts.times("pin") == 0


def test_several_tensors_come_to_the_host_with_one_wait(fake):
    tensors = [torch.randn(n, device=fake) for n in (3, 4, 5)]
    with counting(ROOT) as counts:
        found = on_host(*tensors)
    assert counts.times("wait") == 1
    assert all(torch.equal(mine, theirs.cpu()) for mine, theirs in zip(found, tensors, strict=True))
