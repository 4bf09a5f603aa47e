"""What the device of a run is asked: the run's own card, whatever it is called."""

import pytest
import torch

from camera.runtime.device import accelerator as room
from camera.runtime.device.accelerator import (
    all_cards,
    device_name,
    free_memory,
    has_grouped_products,
    resolve_device,
    share_cards,
    side_stream,
    synchronize,
    total_memory,
)
from camera.runtime.device.peak_memory import PeakMemory
from camera.runtime.errors import CameraError
from camera.runtime.overlap import LayerPrefetcher
from experiments.bench.support import timing
from tests import fake_device

BIG = 3_000_000


@pytest.fixture
def shared():
    """share_cards, undone at the end."""
    yield share_cards
    share_cards(None)


def test_a_card_is_waited_for_that_is_not_the_current_one(fake, device):
    on_card = torch.ones(8, device=device)
    assert torch.accelerator.current_device_index() == 0
    for wait in (synchronize, timing.now):
        on_host = on_card.to("cpu", non_blocking=True)
        torch.accelerator.synchronize()  # of the current card: it isn't there yet
        assert on_host.isnan().all()
        wait(device)
        assert (on_host == 1).all()


def test_memory_is_the_cards_own(device):
    place = torch.device(device)
    assert 0 < free_memory(place) <= total_memory(place)
    before = free_memory(place)
    held = torch.zeros(BIG, device=device)
    assert free_memory(place) <= before - 4 * BIG
    assert torch.get_device_module(place).mem_get_info(place)[1] == total_memory(place)
    del held


def test_peaks_of_the_card_and_of_the_process_are_apart(device):
    with PeakMemory(torch.device(device), every=0.001) as peak:
        on_card = torch.zeros(BIG, device=device)
        del on_card
        other = torch.zeros(BIG, device=torch.device(device).type + ":0")
    assert 4 * BIG <= peak.added < 8 * BIG
    assert peak.host_bytes > peak.bytes > 0
    del other


def test_layers_come_by_a_stream_of_their_own(fake, device):
    place = torch.device(device)
    assert side_stream(place).device == place and side_stream(torch.device("cpu")) is None
    weight = torch.arange(64.0).view(8, 8)

    def read(layer, _):
        return {"w": (weight + layer).pin_memory().to(place, non_blocking=True)}

    layers = LayerPrefetcher(read, 3, place)
    for layer in range(3):
        with fake_device.counting() as counts:
            (found,) = layers.get(layer).values()
            assert str(found.device) == device
            torch.testing.assert_close(found.cpu(), weight + layer)
        layers.start_next()
        assert layer or counts.times("h2d pinned") == 1


@pytest.mark.parametrize(
    ("capability", "dtype", "grouped"),
    [
        ((8, 0), torch.bfloat16, False),
        ((8, 9), torch.bfloat16, False),
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, False),
        ((9, 0), torch.float32, False),
        ((10, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, False),
    ],
)
def test_products_are_grouped_where_torch_has_a_kernel(fake, capability, dtype, grouped):
    count = torch.accelerator.device_count()
    a_NH = torch.ones(8, 16, dtype=dtype, device=fake)
    b_EHW = torch.ones(2, 16, 16, dtype=dtype, device=fake)
    ends_E = torch.tensor([3, 8], dtype=torch.int32, device=fake)
    fake_device.activate(fake, devices=count, capability=capability)
    try:
        said = has_grouped_products(torch.device(fake), dtype)
        with fake_device.counting() as counts:
            torch.nn.functional.grouped_mm(a_NH, b_EHW, offs=ends_E)
    finally:
        fake_device.activate(fake, devices=count)
    assert said == (grouped and fake == "cuda") == (counts.times("wait") == 0)


def test_a_device_has_the_name_of_its_card(device):
    assert device_name(torch.device("cpu")) is None
    assert isinstance(device_name(torch.device(device)), str)


def test_auto_is_the_accelerator_and_a_number_stays(accelerator, device):
    assert resolve_device("auto") == accelerator
    assert resolve_device(device) == device
    assert all_cards("auto") == torch.accelerator.device_count()
    assert all_cards(device) == 1
    with pytest.raises(CameraError, match="not available here"):
        resolve_device(f"{accelerator}:{torch.accelerator.device_count()}")


def test_processes_side_by_side_take_a_card_each(fake, shared):
    last = torch.accelerator.device_count() - 1
    for number in (0, last):
        shared(number)
        assert resolve_device("auto") == resolve_device(fake) == f"{fake}:{number}"
        assert resolve_device("cpu") == "cpu" and resolve_device(f"{fake}:0") == f"{fake}:0"
        assert all_cards("auto") == 1  # a model isn't spread over the others' cards
    shared(last + 1)  # one job more than there are cards
    assert resolve_device("auto") == f"{fake}:0"
    shared(0, ranks=last + 2)  # every rank says so, or one would wait for the others for ever
    with pytest.raises(CameraError, match=f"which has {last + 1} {fake}: start it with"):
        resolve_device("auto")
    assert resolve_device("cpu") == "cpu"


def test_only_processes_that_share_cards_change_the_current_one(fake, shared, device):
    place = torch.device(device)
    room.make_current(place)
    assert torch.accelerator.current_device_index() == 0
    shared(place.index)
    room.make_current(place)
    try:
        assert torch.accelerator.current_device_index() == place.index
    finally:
        torch.accelerator.set_device_index(0)
