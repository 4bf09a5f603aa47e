"""Sampling of peak memory."""

import threading

import psutil
import torch


class PeakMemory:
    """Peak memory over a `with` block: of the accelerator if there is one, else of the process."""

    def __init__(self, device: torch.device, every: float = 0.05):
        self._device, self._every = device, every
        self._stop = threading.Event()
        self._sampled = 0
        self.before = 0  # held when the block began

    @property
    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._sampled

    def now(self) -> int:
        """Memory held at this moment, in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return psutil.Process().memory_info().rss

    @property
    def added(self) -> int:
        """What the block added at its peak."""
        return self.bytes - self.before

    def __enter__(self) -> "PeakMemory":
        self.before = self.now()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._device.type != "cuda":
            self._thread.join()

    def _watch(self) -> None:
        while True:
            self._sampled = max(self._sampled, self.now())
            if self._stop.wait(self._every):
                return
