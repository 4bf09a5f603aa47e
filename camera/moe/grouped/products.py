"""Products of each expert's rows with its own matrix, in the fewest launches that pay.

Shapes: E experts, R rows of all of them, N rows of one, C columns in, D columns out.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from camera.runtime.device.accelerator import has_grouped_products
from camera.runtime.device.compiled import Compiled
from camera.runtime.device.staging import on_device

LAUNCH_FLOPS = 1e9  # that a card multiplies in the time that a launch takes
FILLING_LAUNCHES = 12  # of a batched product and what fills it up
FILLED_ROWS, FILLED_SHARE = 128, 1.5  # so few that reading a matrix takes the time; else of a mean
LARGE = 2**20  # numbers of all rows; a tiny model is done before a kernel would be compiled
ALIGNED = 16  # numbers
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_products(
    x_RC: torch.Tensor, weight_ECD: torch.Tensor, bounds: list[tuple[int, int]]
) -> torch.Tensor:
    """y_RD: rows [first, last) of each expert times its matrix; the bounds leave no row out.

    torch's own kernel where the card has one. Elsewhere a batched product, filled up to the expert
    that has most rows, where multiplying what fills takes less time than asking for each expert;
    else our kernel where the card has a compiler; else one product an expert.
    """
    if has_grouped_products(x_RC.device, x_RC.dtype) and _aligned(x_RC, weight_ECD):
        ends_E = torch.tensor([last for _, last in bounds], dtype=torch.int32)
        return F.grouped_mm(x_RC, weight_ECD, offs=on_device(ends_E, x_RC.device))
    if filling_pays(x_RC.device, bounds, weight_ECD[0].numel()):
        return filled_products(x_RC, weight_ECD, bounds)
    if x_RC.dtype in KERNEL_DTYPES:
        return looped_or_kernel(x_RC, weight_ECD, bounds)
    return looped_products(x_RC, weight_ECD, bounds)


def in_one_kernel(x_RC: torch.Tensor) -> bool:
    """Whether the products of all experts with such rows are one kernel, however many they have."""
    if has_grouped_products(x_RC.device, x_RC.dtype):
        return True
    return x_RC.dtype in KERNEL_DTYPES and looped_or_kernel.compiles(x_RC)


def looped_products(
    x_RC: torch.Tensor, weight_ECD: torch.Tensor, bounds: list[tuple[int, int]]
) -> torch.Tensor:
    """The same as one product an expert."""
    if torch.is_grad_enabled() and (x_RC.requires_grad or weight_ECD.requires_grad):
        pairs = zip(bounds, weight_ECD, strict=True)
        return torch.cat([x_RC[first:last] @ weight_CD for (first, last), weight_CD in pairs])
    y_RD = x_RC.new_empty(len(x_RC), weight_ECD.shape[2])
    for (first, last), weight_CD in zip(bounds, weight_ECD, strict=True):
        if last > first:
            torch.mm(x_RC[first:last], weight_CD, out=y_RD[first:last])
    return y_RD


def looped_ragged_products(
    x_RC: torch.Tensor,
    table: torch.Tensor,
    starts: Sequence[int],
    widths: Sequence[int],
    bounds: list[tuple[int, int]],
    varies: Literal["in", "out"],
) -> torch.Tensor:
    """y_RD: rows [first, last) of each expert times its own matrix, of a width of its own.

    An expert's matrix is the block of rows [start, start + width) of a table. varies "in": x_RC
    times the block, whatever finite numbers x has from the width on. varies "out": x_RC times the
    block transposed; D is `padded_width`, and y is 0 from the width on.
    """
    y_RD = x_RC.new_zeros(len(x_RC), table.shape[1] if varies == "in" else padded_width(widths))
    for start, width, (first, last) in zip(starts, widths, bounds, strict=True):
        if last > first:
            block, x_NC, y_ND = table[start : start + width], x_RC[first:last], y_RD[first:last]
            if varies == "in":
                torch.mm(x_NC[:, :width], block, out=y_ND)
            else:
                y_ND[:, :width] = x_NC @ block.t()
    return y_RD


def padded_width(widths: Sequence[int]) -> int:
    """The widest, rounded up to rows that a kernel reads 16 bytes at once."""
    return -(-max(widths) // ALIGNED) * ALIGNED


def _grouped_gemm(_: Callable) -> Callable:
    from camera.moe.grouped.grouped_gemm import grouped_gemm  # needs Triton

    return grouped_gemm


def _ragged_gemm(_: Callable) -> Callable:
    from camera.moe.grouped.grouped_gemm import ragged_gemm

    return ragged_gemm


looped_or_kernel = Compiled(looped_products, _grouped_gemm, LARGE)
ragged_products = Compiled(looped_ragged_products, _ragged_gemm, LARGE)  # without gradients


def filling_pays(device: torch.device, bounds: list[tuple[int, int]], weights: int) -> bool:
    """Whether one batched product, filled up, takes less time than one product an expert of so many
    weights."""
    if device.type == "cpu":
        return False
    counts = [last - first for first, last in bounds]
    most, rows, spared = max(counts), sum(counts), sum(map(bool, counts)) - FILLING_LAUNCHES
    filling = 2 * (most * len(counts) - rows) * weights
    few = most <= max(FILLED_ROWS, FILLED_SHARE * rows / len(counts))
    return few and spared > 0 and filling < LAUNCH_FLOPS * spared


def filled_products(
    x_RC: torch.Tensor, weight_ECD: torch.Tensor, bounds: list[tuple[int, int]]
) -> torch.Tensor:
    """The same as one batched product: every expert's rows filled up to the most that one has."""
    most = max(last - first for first, last in bounds)
    ends = torch.tensor(bounds)
    first_E, count_E = on_device(torch.stack((ends[:, 0], ends[:, 1] - ends[:, 0])), x_RC.device)
    step_N = torch.arange(most, device=x_RC.device)
    row_EN = (first_E[:, None] + step_N).clamp_(max=len(x_RC) - 1)  # what fills is anyone's
    x_ENC = x_RC.index_select(0, row_EN.view(-1)).view(len(bounds), most, -1)
    y_END = torch.bmm(x_ENC, weight_ECD)
    expert_E = torch.arange(len(bounds), device=x_RC.device)
    shift_R = (expert_E * most - first_E).repeat_interleave(count_E, output_size=len(x_RC))
    place_R = shift_R + torch.arange(len(x_RC), device=x_RC.device)
    return y_END.view(-1, weight_ECD.shape[2]).index_select(0, place_R)


def _aligned(x_RC: torch.Tensor, weight_ECD: torch.Tensor) -> bool:
    """Rows of 16 bytes, or of a multiple: what the kernel reads."""
    return all(size * x_RC.element_size() % 16 == 0 for size in weight_ECD.shape[1:])
