"""What a long run shows: layer, time left, memory; and the peak of memory it took."""

import threading
from collections.abc import Callable, Iterable, Iterator

import psutil
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EachLayer = Callable[[str, int], Iterable[int]]
"""each_layer(title, start): the layers from `start` on, behind a progress bar."""


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


def each_layer(start: int, count: int, title: str, memory: PeakMemory, show: bool) -> Iterator[int]:
    """Iterate over the layers from `start` behind a progress bar with time left and memory."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]:.2f} GB"),
    )
    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task(title, total=count, completed=start, memory=memory.now() / 1e9)
        for index in range(start, count):
            yield index
            progress.update(task, advance=1, memory=memory.now() / 1e9)
