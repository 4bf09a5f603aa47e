"""Peak memory of a part of a run, of the process and of the device."""

import threading

import psutil
import torch

from camera.runtime.device.accelerator import has_own_memory


class PeakMemory:
    """Peak memory over a `with` block, of the process and of a device with memory of its own.

    `bytes` and `added` are the device's, the process's on a CPU; `host_bytes` and `host_added` are
    the process's always. The process is sampled every so many seconds, the device says its peak.
    """

    def __init__(self, device: torch.device, every: float = 0.05):
        self._device, self._every = device, every
        self._apart = has_own_memory(device)
        self._stop = threading.Event()
        self.host_bytes = 0
        self.before = self.host_before = 0  # held when the block began

    @property
    def bytes(self) -> int:
        """The device's peak so far."""
        if self._apart:
            return torch.accelerator.max_memory_allocated(self._device)
        return self.host_bytes

    def now(self) -> int:
        """The device's memory held at this moment, in bytes."""
        return torch.accelerator.memory_allocated(self._device) if self._apart else _resident()

    @property
    def added(self) -> int:
        """What the block added on the device at its peak."""
        return self.bytes - self.before

    @property
    def host_added(self) -> int:
        """What the block added to the process at its peak."""
        return self.host_bytes - self.host_before

    def __enter__(self) -> "PeakMemory":
        self.before, self.host_before = self.now(), _resident()
        if self._apart:
            torch.accelerator.reset_peak_memory_stats(self._device)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.host_bytes = max(self.host_bytes, _resident())
            if self._stop.wait(self._every):
                return


def _resident() -> int:
    return psutil.Process().memory_info().rss
