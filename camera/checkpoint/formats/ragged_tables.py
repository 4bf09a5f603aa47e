"""The two tables that hold a layer's experts of unequal width, and the places of their rows.

Shapes: H hidden, E experts, W kept width of one expert, S = sum of the kept widths.

A row of `down_proj` is one micro-expert's output vector, so that an expert is one block of memory
in both tables. Experts stand in them by width, the narrowest first (ties by index): experts of one
width are neighbours, and a run of them is a uniform [n, W, H] view. The rows of `gate_up_proj` are
an expert's W gate rows, then its W up rows, so that one matrix product serves both.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from camera.checkpoint.formats.biases import ExpertBiases
from camera.moe.experts.activation import Activation
from camera.moe.experts.group import RoutedExperts
from camera.moe.experts.layout import ExpertLayout
from camera.moe.experts.module import ExpertModule
from camera.moe.pool import rows_on


class RaggedTables(ExpertBiases, nn.Module):
    """gate_up_proj [2S, H] and down_proj [S, H], empty until they are loaded or filled."""

    def __init__(
        self,
        hidden: int,
        widths: list[int],
        act_fn: Activation,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layout: ExpertLayout = ExpertLayout(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        self.hidden_dim, self.num_experts = hidden, len(widths)
        self.layout = layout
        self.widths = list(widths)
        self._rows = RaggedRows(widths)
        self.order, self.starts = self._rows.order, self._rows.starts
        self.micro_experts = self._rows.total
        rows = self.micro_experts
        self.gate_up_proj = nn.Parameter(torch.empty(2 * rows, hidden, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(rows, hidden, device=device, dtype=dtype))
        biases = (2 * rows, len(widths), hidden) if layout.biased else None
        self._register_biases(biases, device, dtype)
        self.act_fn = act_fn

    def to_native(self, width: int) -> dict[str, torch.Tensor]:
        """The tensors of the native module, zero-padded, on the tables' device."""
        count, hidden, biased = self.num_experts, self.hidden_dim, self.layout.biased
        gate_up = self.gate_up_proj.new_zeros(count, 2, width, hidden)
        down = self.down_proj.new_zeros(count, hidden, width)
        bias = self.gate_up_proj.new_zeros(count, 2, width) if biased else None
        for e, kept in enumerate(self.widths):
            gate_up[e, :, :kept] = self.gate_up(e).detach().unflatten(0, (2, kept))
            down[e, :, :kept] = self.down(e).detach()
            if bias is not None:
                bias[e, :, :kept] = self.gate_up_bias(e).unflatten(0, (2, kept))
        bias = None if bias is None else bias.flatten(1)
        return self.layout.native(gate_up.flatten(1, 2), down, bias, self.down_proj_bias)

    def gate_up(self, expert: int) -> torch.Tensor:
        """Rows of one expert, [2W, H]: gate first, then up."""
        start = self.starts[expert]
        return self.gate_up_proj[2 * start : 2 * (start + self.widths[expert])]

    def gate_up_bias(self, expert: int) -> torch.Tensor | None:
        """Biases of these rows, [2W]; None where there are none."""
        if self.gate_up_proj_bias is None:
            return None
        start = self.starts[expert]
        return self.gate_up_proj_bias[2 * start : 2 * (start + self.widths[expert])]

    def down(self, expert: int) -> torch.Tensor:
        """Columns of one expert, [H, W], as a view of its rows."""
        start = self.starts[expert]
        return self.down_proj[start : start + self.widths[expert]].t()

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden_dim}, experts={self.num_experts}, "
            f"micro_experts={self.micro_experts}, widths={min(self.widths)}..{max(self.widths)}"
        )


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


def fill(
    plain: RaggedTables,
    experts: ExpertModule | RoutedExperts,
    rows: Sequence[torch.Tensor] | None = None,
) -> None:
    """Copy the weights of other experts into tables of their widths; `rows`: of these alone."""
    plain.requires_grad_(False)
    if rows is not None:
        (rows,) = rows_on({"": list(rows)}, plain.down_proj.device).values()
    for e, width in enumerate(plain.widths):
        if not width and not plain.layout.biased:
            continue
        whole, bias_2W = experts.gate_up(e), experts.gate_up_bias(e)
        if bias_2W is not None:
            kept = bias_2W if rows is None else bias_2W.view(2, -1)[:, rows[e]].flatten()
            plain.gate_up_bias(e).copy_(kept)
            plain.down_bias(e).copy_(experts.down_bias(e))
        if rows is None:
            plain.gate_up(e).copy_(whole)
            plain.down(e).copy_(experts.down(e))
            continue
        halves = whole if isinstance(whole, tuple) else whole.chunk(2)
        for half, part in zip(halves, plain.gate_up(e).chunk(2), strict=True):
            torch.index_select(half, 0, rows[e], out=part)
        # written row by row: a copy into the transposed view would take several times as long
        plain.down(e).t().copy_(experts.down(e).index_select(1, rows[e]).t())
