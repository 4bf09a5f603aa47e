"""Clocks of the benchmarks: sides that take turns, and what the machine can do at most."""

import time
from collections.abc import Callable

import torch

from camera.runtime.device.accelerator import synchronize

PEAK_SIZE = 1024


def take_turns(
    sides: dict[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, float]:
    """Seconds of each side on a device: the best of its turns, after one that warms up.

    Other work on the machine only ever adds time, and hits all sides alike while they take turns.
    """
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            took = seconds(side, device)
            if turn:
                spent[name].append(took)
    return {name: min(took) for name, took in spent.items()}


def seconds(side: Callable[[], object], device: str = "cpu") -> float:
    """How long one call takes, with all that it started on the device."""
    start = now(device)
    side()
    return now(device) - start


def now(device: str = "cpu") -> float:
    """The clock, once the device has done what it was told."""
    synchronize(device)
    return clock(device)()


def clock(device: str = "cpu") -> Callable[[], float]:
    """On one CPU thread the process's own time, which stands still while other programs run."""
    alone = torch.get_num_threads() == 1 and torch.device(device).type == "cpu"
    return time.process_time if alone else time.perf_counter


def matmul_peak(device: str, size: int = PEAK_SIZE) -> tuple[Callable[[], object], int]:
    """A square fp32 matrix product, and its FLOPs: the peak that other work is held against."""
    a, b = torch.randn(2, size, size, device=device).unbind(0)
    return lambda: a @ b, 2 * size**3
