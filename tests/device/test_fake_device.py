"""What the fake device promises: the CPU's values, CUDA's refusals, late copies, counts."""

import copy
import gc
import io
import threading

import numpy
import pytest
import torch

from tests import fake_device

SAME = "Expected all tensors to be on the same device"
BIG = 1 << 16


@pytest.fixture(autouse=True)
def _needs(fake):
    yield
    torch.accelerator.synchronize()


def matrix(*shape, device=None, seed=0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made if device is None else made.to(device)


def test_torch_sees_an_accelerator_of_that_name(fake):
    assert torch.accelerator.is_available() and torch.accelerator.device_count() == 2
    assert torch.accelerator.current_accelerator().type == fake
    assert torch.empty(1, device=fake).device == torch.device(fake, 0)
    if fake == "cuda":
        assert torch.cuda.is_available() and torch.empty(1, device="cuda:1").is_cuda


@pytest.mark.parametrize(
    "compute",
    [
        lambda a, b: a @ b.T,
        lambda a, b: torch.addmm(a[:, 0], a, b.T),
        lambda a, b: torch.cat([a, b]).softmax(-1).topk(2).values,
        lambda a, b: a.sort(descending=True, stable=True).indices,
        lambda a, b: torch.linalg.cholesky(a.T @ a + torch.eye(4, device=a.device)),
        lambda a, b: torch.zeros_like(a).index_copy_(0, a[:, 0].argsort(), b),
        lambda a, b: a[a > 0],
        lambda a, b: torch.where(a > b, a, b).cumsum(0)[1:, ::2].t().contiguous(),
        lambda a, b: torch.nn.functional.scaled_dot_product_attention(
            a[None, None], b[None, None], b[None, None]
        ),
        lambda a, b: torch.bincount((a > 0).long().flatten(), minlength=5),
        lambda a, b: torch.stack(a.aminmax()),
        lambda a, b: a.double().norm(dim=1).to(torch.bfloat16).float(),
    ],
)
def test_values_are_those_of_the_cpu(fake, compute):
    a, b = matrix(6, 4), matrix(6, 4, seed=1)
    found = compute(a.to(fake), b.to(fake))
    assert found.device.type == fake
    torch.testing.assert_close(found.cpu(), compute(a, b), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_the_cpu(fake):
    def gradient(device):
        x, w = matrix(5, 4, device=device), matrix(4, 3, seed=1, device=device).requires_grad_()
        (
            torch.nn.functional.silu(x @ w)
            .index_select(0, torch.tensor([0, 2], device=device))
            .square()
            .sum()
        ).backward()
        return w.grad.cpu()

    torch.testing.assert_close(gradient(fake), gradient("cpu"), rtol=1e-6, atol=1e-6)


def test_views_share_memory_and_outputs_are_resized(fake):
    a = torch.zeros(4, 6, device=fake)
    a.view(-1)[3:7].fill_(1)
    a.t()[5] += 2
    assert a.sum().item() == 12
    out = torch.empty(0, device=fake)
    torch.add(a, a, out=out)
    assert out.shape == a.shape and torch.equal(out, a * 2)


@pytest.mark.parametrize(
    "mix",
    [
        lambda d, h: d + h,
        lambda d, h: h * d,
        lambda d, h: d @ h.T,
        lambda d, h: torch.cat([d, h]),
        lambda d, h: torch.where(d > 0, d, h),
        lambda d, h: d.masked_fill(h > 0, 0.0),
        lambda d, h: h.add_(d),
        lambda d, h: torch.zeros(()).add_(d[0, 0]),
        lambda d, h: d.index_select(0, torch.tensor([0])),
        lambda d, h: torch.nn.functional.embedding(torch.tensor([0]), d),
        lambda d, h: d.scatter_(0, torch.tensor([[0]]), 1.0),
        lambda d, h: d.to(torch.device(d.device.type, 1)) + d,
        lambda d, h: torch.nn.functional.linear(d, d, h[:, 0]),
    ],
)
def test_devices_do_not_mix(fake, mix):
    with pytest.raises(RuntimeError, match=SAME):
        mix(matrix(3, 4, device=fake), matrix(3, 4))


def test_what_cuda_allows_is_allowed(fake):
    d = matrix(3, 4, device=fake)
    assert torch.equal((d + torch.tensor(1.0)).cpu(), d.cpu() + 1)  # a scalar of the host
    assert d[torch.tensor([0, 2])].shape == (2, 4)  # the host's indices go to the device
    d[torch.tensor([True, False, True])] = 0.0
    assert d[2].abs().sum().item() == 0


def test_the_host_gets_no_pointer(fake):
    d = matrix(3, 4, device=fake)
    with pytest.raises(TypeError, match="numpy"):
        d.numpy()
    with pytest.raises(TypeError, match="numpy"):
        numpy.ones(4)[d[0] > 0]
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        matrix(3, 4)[torch.tensor([0], device=fake)]
    with pytest.raises(RuntimeError, match="pinned"):
        d.pin_memory()


def test_a_generator_belongs_to_its_device(fake):
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, device=fake, generator=torch.Generator())
    with pytest.raises(RuntimeError):
        torch.randn(3, generator=torch.Generator(fake))
    first, second = (
        torch.rand(3, device=fake, generator=torch.Generator(fake).manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, second)
    before = torch.get_rng_state()
    torch.rand(3, device=fake)
    assert torch.equal(before, torch.get_rng_state())  # the host's numbers are its own
    torch.manual_seed(3)
    again = torch.rand(3, device=fake)
    torch.manual_seed(3)
    assert torch.equal(again, torch.rand(3, device=fake))


def test_a_copy_to_the_host_comes_late(fake):
    d = matrix(8, device=fake)
    h = d.to("cpu", non_blocking=True)
    assert h.is_pinned() and h.isnan().all()
    torch.accelerator.synchronize()
    assert torch.equal(h, d.cpu())


def test_a_copy_to_pageable_memory_waits(fake):
    d, h = matrix(8, device=fake), torch.empty(8)
    with fake_device.counting() as counts:
        h.copy_(d, non_blocking=True)
    assert torch.equal(h, d.cpu()) and counts.times("wait") == 1


def test_another_stream_does_not_see_a_copy_it_did_not_wait_for(fake):
    h, side = matrix(8).pin_memory(), torch.Stream(device=fake)
    with side:
        d = h.to(fake, non_blocking=True)
    assert (d + 0).cpu().isnan().all()
    torch.accelerator.current_stream().wait_stream(side)
    assert torch.equal((d + 0).cpu(), h)


def test_the_same_stream_sees_its_copies_in_order(fake):
    h = matrix(8).pin_memory()
    d = h.to(fake, non_blocking=True)
    assert torch.equal((d * 2).cpu(), h * 2)


def test_pinned_memory_that_is_overwritten_too_early_is_what_arrives(fake):
    h = torch.zeros(8).pin_memory()
    d = h.to(fake, non_blocking=True)
    h.fill_(7)
    assert (d == 7).all().item()


def test_an_event_is_waited_for(fake):
    d, event = matrix(8, device=fake), torch.Event(device=fake)
    h = d.to("cpu", non_blocking=True)
    event.record(torch.accelerator.current_stream())
    assert not event.query()  # the first question comes too early
    assert event.query() and torch.equal(h, d.cpu())


def test_copies_of_a_thread_and_its_stream(fake):
    found, h = [], matrix(64, 64).pin_memory()

    def work():
        side = torch.Stream(device=fake)
        for _ in range(50):
            with side:
                found.append(h.to(fake, non_blocking=True))
            side.synchronize()

    threads = [threading.Thread(target=work) for _ in range(3)]
    [thread.start() for thread in threads]
    with fake_device.counting():
        while any(thread.is_alive() for thread in threads):
            (matrix(4, 4, device=fake) @ matrix(4, 4, device=fake)).sum().item()
    assert len(found) == 150 and all(torch.equal(d.cpu(), h) for d in found[::50])


def test_counts_are_those_of_the_lines(fake):
    d, h = matrix(4, 4, device=fake), matrix(4, 4)
    with fake_device.counting(__file__) as counts:
        for _ in range(3):
            e = d @ d
            e.sum().item()
        h.to(fake)
        e.cpu()
        d[d > 0]
    lines = {line: kinds for (_, line, _), kinds in counts.lines().items()}
    first = min(lines)
    assert lines[first]["launch"][0] == 3
    assert lines[first + 1]["launch"][0] == 3 and lines[first + 1]["wait"][0] == 3
    assert lines[first + 2]["h2d pageable"] == (1, 64)
    assert lines[first + 3]["d2h pageable"] == (1, 64) and lines[first + 3]["wait"][0] == 1
    assert lines[first + 4]["wait"][0] == 1
    assert "test_fake_device.py" in counts.table()


def test_memory_is_counted_and_ends(fake):
    gc.collect()
    core = fake_device.core()
    before = core.memory(0)[0]
    with fake_device.counting() as counts:
        a = torch.empty(BIG, device=fake)
        del a
        b = torch.empty(BIG // 2, device=fake)
    assert counts.peak - before == 4 * BIG and core.memory(0)[0] - before == 2 * BIG
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(core.total(), device=fake)
    del b
    pinned = torch.empty(3000, dtype=torch.uint8).pin_memory()
    assert pinned.is_pinned() and pinned[10:].is_pinned() and fake_device.pinned()[0] >= 4096


def test_tensors_are_saved_loaded_and_copied(fake):
    d, file = matrix(3, 4, device=fake), io.BytesIO()
    torch.save(d, file)
    file.seek(0)
    assert torch.equal(torch.load(file), d)
    file.seek(0)
    assert torch.load(file, map_location="cpu").device.type == "cpu"
    assert copy.deepcopy(d).device == d.device


def test_grouped_products_wait_below_hopper(fake):
    a, b = (
        torch.ones(8, 16, dtype=torch.bfloat16, device=fake),
        torch.ones(2, 16, 16, dtype=torch.bfloat16, device=fake),
    )
    ends = torch.tensor([3, 8], dtype=torch.int32, device=fake)
    with fake_device.counting() as counts:
        torch.nn.functional.grouped_mm(a, b, offs=ends)
    assert counts.times("wait") == 1 and counts.times("launch") == 2
    if fake == "cuda":
        fake_device.activate(fake, devices=2, capability=(9, 0))
        with fake_device.counting() as counts:
            found = torch.nn.functional.grouped_mm(a, b, offs=ends)
        fake_device.activate(fake, devices=2, capability=(8, 0))
        assert counts.times("wait") == 0 and counts.times("launch") == 1 and (found == 16).all()


def test_tensors_of_the_host_are_counted_and_no_kernels_of_a_device(fake):
    with fake_device.counting() as counts:
        plain = torch.empty(BIG, dtype=torch.uint8)
        pinned = torch.empty(BIG - 1, dtype=torch.uint8, pin_memory=True)
        a = torch.ones(BIG, device=fake)
        (a.sort().values + a).sum()
        del plain, pinned
    assert counts.peak_host == 2 * BIG
    assert "test_tensors_of_the_host" in counts.on_host()
