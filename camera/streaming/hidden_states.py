"""Where hidden states wait between layers: on the device, in the host's memory, or on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import torch

from camera.runtime.device.accelerator import current_stream, has_own_memory, side_stream
from camera.runtime.mapped import MappedTable

HiddenPlace = Literal["device", "ram", "disk"]
Batch = TypeVar("Batch")


class HiddenStates:
    """Keeps tables of hidden states at their place, and brings them to the device.

    From a device with memory of its own, tables go to pinned memory and back on a stream beside
    the computing: while a batch is computed, the next one comes and the last one goes. The host may
    read what is kept after `settle`.
    """

    def __init__(self, device: torch.device, place: HiddenPlace, folder: Path | None = None):
        self._device, self._folder = device, folder
        self._place = place
        apart = has_own_memory(device) and place == "ram"
        self._stream = side_stream(device) if apart else None

    def keep(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states on their way to the next layer."""
        if self._place == "device":
            return states
        if self._place == "disk":
            tokens, hidden = states[..., 0].numel(), states.shape[-1]
            table = MappedTable(tokens, hidden, states.dtype, -1, self._folder)
            table.write(0, states)
            return table.read(0, tokens).view_as(states)
        if self._stream is None or not has_own_memory(states.device):
            return states.cpu()
        kept = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
        self._stream.wait_stream(current_stream(self._device))
        with self._stream:
            kept.copy_(states, non_blocking=True)
        states.record_stream(self._stream)
        return kept

    def fetch(self, *tables: torch.Tensor) -> list[torch.Tensor]:
        """Tables on the device."""
        return self._arrived(self._ask(tables))

    def fetched(
        self, batches: list[Batch], tables: Callable[[Batch], list[torch.Tensor]], *, use_up: bool
    ) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
        """Each batch and its `tables` on the device; the next one's are copied meanwhile.

        `use_up` empties the list on the way, so that no batch is there twice.
        """
        waiting = batches if use_up else list(batches)
        coming: tuple[Batch, list[torch.Tensor]] | None = None
        while waiting or coming:
            batch, found = coming or (waiting[0], self._ask(tables(waiting[0])))
            waiting.pop(0)
            found, coming = self._arrived(found), None
            if waiting and self._stream is not None:
                coming = waiting[0], self._ask(tables(waiting[0]))
            yield batch, found
            del batch, found

    def settle(self) -> None:
        """Wait until all that is kept has arrived."""
        if self._stream is not None:
            self._stream.synchronize()

    def _ask(self, tables: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        if self._stream is None:
            return [table.to(self._device) for table in tables]
        with self._stream:
            return [table.to(self._device, non_blocking=True) for table in tables]

    def _arrived(self, tables: list[torch.Tensor]) -> list[torch.Tensor]:
        if self._stream is not None:
            here = current_stream(self._device)
            here.wait_stream(self._stream)
            for table in tables:
                table.record_stream(here)
        return tables
