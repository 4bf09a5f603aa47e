"""One function, compiled where an accelerator has a compiler, and the same everywhere."""

import pytest
import torch
from torch.nn import functional as F

from camera.moe.grouped import phi
from camera.moe.grouped.rows import BLOCK
from camera.runtime.device import compiled
from camera.runtime.device.compiled import Compiled, has_compiler


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Every tensor is large enough."""
    monkeypatch.setattr(compiled, "LARGE", 1)


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return 2 * tensor


def test_a_cpu_runs_it_as_it_is_written(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert torch.equal(Compiled(doubled)(torch.ones(3)), torch.full((3,), 2.0))
    assert not has_compiler(torch.device("cpu"))


def test_small_tensors_are_not_worth_compiling(monkeypatch):
    monkeypatch.setattr(compiled, "LARGE", 4)
    monkeypatch.setattr(compiled, "has_compiler", lambda device: True)
    made = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: made.append(f) or f)
    run = Compiled(doubled)
    run(torch.ones(3))
    assert not made
    run(torch.ones(4)), run(torch.ones(5))
    assert made == [doubled]


def test_the_fake_device_has_no_compiler(fake):
    assert not has_compiler(torch.device(fake))


def test_where_compiling_fails_it_runs_as_it_is_written_and_says_so(monkeypatch, caplog):
    tried = []

    def fails(function, **options):
        def run(*args):
            tried.append(function)
            raise RuntimeError("Failed to find C compiler.\nA long story.")

        return run

    monkeypatch.setattr(compiled, "has_compiler", lambda device: True)
    monkeypatch.setattr(torch, "compile", fails)
    run = Compiled(doubled)
    with caplog.at_level("WARNING", "camera"):
        found = [run(torch.ones(3)) for _ in range(2)]
    assert all(torch.equal(one, torch.full((3,), 2.0)) for one in found)
    assert tried == [doubled]
    assert [record.getMessage() for record in caplog.records] == [
        "compiling fails on cpu (Failed to find C compiler.): operators run one by one, which "
        "takes longer."
    ]


def test_a_kernel_that_fails_for_other_tensors_is_given_up_then(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "has_compiler", lambda device: True)

    def kernel(tensor):
        if tensor.dtype == torch.bfloat16:
            raise RuntimeError("no bfloat16 before SM 8.0")
        return 3 * tensor

    run, tensor = Compiled(doubled, lambda _: kernel), torch.ones(3)
    assert torch.equal(run(tensor), 3 * tensor) and run.compiles(tensor)
    with caplog.at_level("WARNING", "camera"):
        assert torch.equal(run(tensor.bfloat16()), 2 * tensor.bfloat16())
    assert torch.equal(run(tensor), 2 * tensor) and not run.compiles(tensor)
    assert len(caplog.records) == 1


def test_no_memory_for_it_is_no_missing_compiler(monkeypatch):
    def full(function, **options):
        def run(*args):
            raise torch.OutOfMemoryError("full")

        return run

    monkeypatch.setattr(compiled, "has_compiler", lambda device: True)
    monkeypatch.setattr(torch, "compile", full)
    with pytest.raises(torch.OutOfMemoryError):
        Compiled(doubled)(torch.ones(3))


def test_phi_compiled_is_phi_operator_by_operator(monkeypatch):
    """By the front half of torch.compile, which any machine has; kernels are a card's own test."""
    compile = torch.compile
    monkeypatch.setattr(compiled, "has_compiler", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda f, **o: compile(f, backend="aot_eager", **o))
    monkeypatch.setattr(phi, "_compiled", Compiled(phi._phi))
    draw = torch.Generator().manual_seed(0)
    for blocks, width in ((3, 24), (5, 24), (2, 40)):
        gate, up = torch.randn(blocks * BLOCK, 2 * width, generator=draw).chunk(2, 1)
        a_R = torch.rand(len(gate), generator=draw)
        found = phi.phi_of(gate, up, a_R, F.silu, True)
        expected = phi._phi(gate, up, a_R, F.silu, True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
