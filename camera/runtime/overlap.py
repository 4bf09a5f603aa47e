"""Prefetching of the next layer, and a background thread that writes the last one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from time import perf_counter

import torch

from camera.runtime.device.accelerator import current_stream, side_stream


class BackgroundWriter:
    """Runs what it is given in a thread; never more than one piece is under way.

    On an accelerator the thread has a stream of its own, which waits for what was computed before a
    piece was given, and for nothing after it. An error surfaces at the next call. `seconds_worked`
    is what the work took, `seconds_waited` the part of it that the main thread stood still for.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._stream = None if device is None else side_stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._work: Future | None = None
        self.seconds_worked = self.seconds_waited = 0.0

    def submit(self, work: Callable[[], None]) -> None:
        """Start a piece of work once the last one is done."""
        self.wait()
        computed = None
        if self._stream is not None:
            computed = current_stream(self._device).record_event()
        self._work = self._thread.submit(self._timed, work, computed)

    def _timed(self, work: Callable[[], None], computed: torch.Event | None) -> None:
        start = perf_counter()
        try:
            if self._stream is None:
                work()
            else:
                self._stream.wait_event(computed)
                with self._stream:
                    work()
                self._stream.synchronize()  # before memory that it reads is freed
        finally:
            self.seconds_worked += perf_counter() - start

    def wait(self) -> None:
        """Return when nothing is under way."""
        if self._work is not None:
            start, work = perf_counter(), self._work
            self._work = None
            try:
                work.result()
            finally:
                self.seconds_waited += perf_counter() - start

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


Read = Callable[[int, bool], dict[str, torch.Tensor]]
"""read(layer, without_experts): the tensors of a layer, copied on the current stream."""


class LayerPrefetcher:
    """Layers from disk to the device, the next one in a thread of its own, on an accelerator also
    on a stream of its own.

    Layers are taken one after the other, up or down. `seconds_read` is what reading took,
    `seconds_waited` the part of it that computing did not hide.
    """

    def __init__(self, read: Read, layers: int, device: torch.device):
        self._read, self._layers, self._device = read, layers, device
        self._stream = side_stream(device)
        self._coming: tuple[tuple[int, bool], Future] | None = None
        self._last, self._up = (-1, False), True
        self.seconds_read = self.seconds_waited = 0.0

    def get(self, index: int, without_experts: bool = False) -> dict[str, torch.Tensor]:
        """The tensors of a layer, waited for if they aren't there yet."""
        start, asked = perf_counter(), (index, without_experts)
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != asked:
            if coming is not None:
                wait([coming[1]])  # wanted or not: never two at a time
            coming = self._begin(asked)
        tensors = coming[1].result()
        if self._stream is not None:
            for tensor in tensors.values():
                tensor.record_stream(current_stream(self._device))
        self._up, self._last = index > self._last[0], asked
        self.seconds_waited += perf_counter() - start
        return tensors

    def start_next(self) -> None:
        """Begin to read what follows the layer taken last."""
        last, without_experts = self._last
        index = last + (1 if self._up else -1)
        if self._coming is None and 0 <= index < self._layers:
            self._coming = self._begin((index, without_experts))

    def drop(self) -> None:
        """Let go of what was read ahead."""
        coming, self._coming = self._coming, None
        if coming is not None:
            wait([coming[1]])

    def _begin(self, asked: tuple[int, bool]) -> tuple[tuple[int, bool], Future]:
        thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        try:
            return asked, thread.submit(self._fetch, *asked)
        finally:
            thread.shutdown(wait=False)  # it ends with the layer

    def _fetch(self, index: int, without_experts: bool) -> dict[str, torch.Tensor]:
        start = perf_counter()
        try:
            if self._stream is None:
                return self._read(index, without_experts)
            with self._stream:
                tensors = self._read(index, without_experts)
            self._stream.synchronize()
            return tensors
        finally:
            self.seconds_read += perf_counter() - start
