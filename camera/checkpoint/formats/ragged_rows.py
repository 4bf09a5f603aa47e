"""Rows of experts of unequal width in the tables of `RaggedExperts`.

Shapes: E experts, W width of one expert, S = sum of the widths.
"""

from collections.abc import Callable, Sequence

import torch


class RaggedRows:
    """Order and first rows of experts, the narrowest first (ties by index), and row indices.

    Indices are made once for each device. They are no buffers, which would stay on meta when a
    checkpoint is loaded.
    """

    def __init__(self, widths: Sequence[int]):
        self.widths = list(widths)
        self.order = sorted(range(len(widths)), key=self.widths.__getitem__)
        self.starts, self.total = [0] * len(widths), 0
        for expert in self.order:
            self.starts[expert] = self.total
            self.total += self.widths[expert]
        self._made: dict[tuple[str, torch.device], tuple[torch.Tensor, ...]] = {}

    def columns(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """For every row of `down_proj`: its gate row, its up row, the expert that owns it."""

        def make() -> tuple[torch.Tensor, ...]:
            widths = torch.tensor(self.widths)[self.order]
            owner_S = torch.tensor(self.order).repeat_interleave(widths)
            row_S = torch.arange(self.total)
            gate_S = row_S + torch.tensor(self.starts)[owner_S]
            return gate_S, gate_S + torch.tensor(self.widths)[owner_S], owner_S

        return self._once("columns", device, make)

    def padded(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """By expert, padded to the widest: gate and up rows, rows of `down_proj`, which are real.

        Padding names rows that exist, of this expert or another.
        """

        def make() -> tuple[torch.Tensor, ...]:
            start, width = (torch.tensor(x).unsqueeze(1) for x in (self.starts, self.widths))
            step = torch.arange(max(self.widths)).unsqueeze(0)
            gate = 2 * start + step
            last = 2 * self.total - 1
            gate_up = torch.cat((gate, gate + width), 1).clamp(max=last).int()
            return gate_up, (start + step).clamp(max=self.total - 1).int(), step < width

        return self._once("padded", device, make)

    def ranks(self, device: torch.device) -> torch.Tensor:
        """Place of each expert in the tables, [E]."""
        (rank_E,) = self._once("ranks", device, lambda: (torch.tensor(self.order).argsort(),))
        return rank_E

    def _once(
        self, name: str, device: torch.device, make: Callable[[], tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        if (name, device) not in self._made:
            self._made[name, device] = tuple(index.to(device) for index in make())
        return self._made[name, device]
