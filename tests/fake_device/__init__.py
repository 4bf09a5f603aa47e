"""A fake accelerator for a CPU-only PyTorch, in place of the card that a test machine hasn't got.

Its devices say `cuda`, or another name, and compute the CPU's values. They refuse what CUDA
refuses: tensors of two devices in one operator, `.numpy()`, a device that isn't there, more memory
than it has. Non-blocking copies come late: until somebody waited for them, the destination holds
NaN (integers 0x55...), and what a pinned source holds then is what arrives. Launches, waits, copies
and bytes are counted by the line of Python that asked for them, and so are the host's tensors.

    fake_device.activate("cuda", devices=2)
    with fake_device.counting("camera") as counts:
        (x @ x.T).sum().item()
    assert counts.times("wait") == 1

`pytest --accelerator=cuda:2` activates it for all tests and the processes that they start.

What it doesn't show: order between two computing streams, memory freed under a stream that still
uses it, atomics, TF32, other orders of summation, speed. A launch is an operator of ATen, which may
be several kernels. NCCL, graphs, Triton and `torch.compile` aren't there.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.fake_device import device_module
from tests.fake_device.build import CannotBuildError, load
from tests.fake_device.counts import Counts, counting

__all__ = [
    "ASKED",
    "CannotBuildError",
    "Counts",
    "activate",
    "asked",
    "core",
    "counting",
    "devices",
    "environment",
    "late",
    "name",
    "pinned",
]

ASKED = "CAMERA_FAKE_DEVICE"  # NAME[:DEVICES][:late=0][:memory=2e9][:capability=9.0]

_core: ModuleType | None = None
_name = ""


def activate(
    name: str = "cuda",
    devices: int = 1,
    memory: int = 40 << 30,
    capability: tuple[int, int] = (8, 0),
    late: bool = True,
) -> None:
    """Give this process devices of that name, for as long as it lives.

    `name` is cuda, or another word for a device of a private kind; `memory` is bytes of each. A
    second call changes all but the name. The first one comes before the first backward pass.
    Raises CannotBuildError.
    """
    global _core, _name
    if _core is not None and name != _name:
        raise RuntimeError(f"this process has a fake {_name} already: one kind a process")
    first, _core = _core is None, _core or load()
    _core.activate("cuda" if name == "cuda" else "private", devices, memory, capability, late)
    _name = name
    if first:
        device_module.install(_core, name)


def core() -> ModuleType:
    """The C++ half of the active fake."""
    if _core is None:
        raise RuntimeError("no fake device: call activate first")
    return _core


def name() -> str:
    """What the active fake's devices are called; empty without one."""
    return _name


def late(on: bool) -> bool:
    """Switch late copies on or off; returns what it was."""
    return core().late(on)


def pinned() -> tuple[int, int, int]:
    """Bytes of pinned memory now and at most, in powers of two as CUDA takes them, and how often
    some was asked for."""
    return core().pinned()


def asked() -> dict[str, Any] | None:
    """What the environment asks for, as arguments of `activate`; None for nothing."""
    text = os.environ.get(ASKED, "")
    if not text:
        return None
    name, *rest = text.split(":")
    found: dict[str, Any] = {"name": name}
    for word in rest:
        key, _, value = word.partition("=")
        if not value:
            found["devices"] = int(key)
        elif key == "late":
            found["late"] = value != "0"
        elif key == "memory":
            found["memory"] = int(float(value))
        elif key == "capability":
            found["capability"] = tuple(int(part) for part in value.split("."))
        else:
            raise ValueError(f"{ASKED}={text}: no setting {key}")
    return found


def environment(text: str) -> dict[str, str]:
    """What gives a process that is started with it the fake device that `text` asks for."""
    everywhere = str(Path(__file__).parent / "everywhere")
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if everywhere not in paths:
        paths.insert(0, everywhere)
    return {ASKED: text, "PYTHONPATH": os.pathsep.join(paths)}


def devices() -> list[torch.device]:
    """All devices of the active fake."""
    return [torch.device(_name, index) for index in range(core().devices())]
