"""Bytes on their way between the host and a device, through pinned buffers of a fixed size.

Pinned memory is rounded up to a power of two and stays with the process: two buffers of a fixed
size, used again and again, take far less of it than a buffer for every tensor.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from camera.runtime.device.accelerator import current_stream, has_own_memory

STAGED = 2**25  # bytes of a buffer; there are two for each way
Fill = Callable[[memoryview], None]
"""fill(view): write the next bytes into the host's memory."""


def on_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one device in the host's memory, waited for once."""
    device = tensors[0].device
    if not has_own_memory(device):
        return [tensor.cpu() for tensor in tensors]
    found = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    current_stream(device).record_event().synchronize()
    return found


def on_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small table of the host on a device, in one copy that nothing waits for."""
    if not has_own_memory(device):
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


class Staging:
    """Two pinned buffers: the host works on one while the other is copied.

    Copies run on the stream that is current where they are asked for, and nothing waits for them
    but the host, when it needs a buffer again.
    """

    def __init__(self, device: torch.device, size: int = STAGED):
        self._device, self._size = device, size
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied: list[torch.Event | None] = [None, None]
        self._turn = self._used = 0

    def upload(self, size: int, fill: Fill) -> torch.Tensor:
        """`size` bytes (uint8) on the device, of which `fill` gives one part after the other."""
        raw, done = torch.empty(size, dtype=torch.uint8, device=self._device), 0
        while done < size:
            part = self._room(size - done)
            fill(memoryview(part.numpy()))
            raw[done : done + len(part)].copy_(part, non_blocking=True)
            done += len(part)
        return raw

    def download(self, tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
        """The bytes of tensors, one after the other; each view is valid until the next is asked
        for."""
        ready: tuple[int, int] | None = None
        for filled in self._filled(tensors):
            if ready is not None:
                yield self._view(*ready)
            ready = filled
        if ready is not None:
            yield self._view(*ready)

    def _filled(self, tensors: Iterable[torch.Tensor]) -> Iterator[tuple[int, int]]:
        """(buffer, bytes) of every buffer that copies into it were asked for."""
        turn = used = 0
        for tensor in tensors:
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            done = 0
            while done < len(raw):
                if used == self._size:
                    self._mark(turn)
                    yield turn, used
                    turn, used = 1 - turn, 0
                count = min(len(raw) - done, self._size - used)
                target = self._buffers[turn][used : used + count]
                target.copy_(raw[done : done + count], non_blocking=True)
                done, used = done + count, used + count
        if used:
            self._mark(turn)
            yield turn, used

    def _room(self, wanted: int) -> torch.Tensor:
        """The next bytes of a buffer that nothing is copied from any more."""
        if self._used == self._size:
            self._mark(self._turn)
            self._turn, self._used = 1 - self._turn, 0
            self._wait(self._turn)
        start = self._used
        self._used = min(start + wanted, self._size)
        return self._buffers[self._turn][start : self._used]

    def _view(self, turn: int, used: int) -> memoryview:
        self._wait(turn)
        return memoryview(self._buffers[turn][:used].numpy())

    def _mark(self, turn: int) -> None:
        self._copied[turn] = current_stream(self._device).record_event()

    def _wait(self, turn: int) -> None:
        event, self._copied[turn] = self._copied[turn], None
        if event is not None:
            event.synchronize()
