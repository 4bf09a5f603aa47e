"""The grouped products as one Triton kernel: each tile of rows by its own expert's matrix.

The rows' bounds are known on the host, which cuts them into tiles and tells the kernel of each tile
where its matrix begins; so there is one launch, however many experts there are and however unequal
their rows and widths. fp32 is multiplied as such, without TF32; half precision is summed in fp32.

Shapes: E experts, R rows of all of them, N rows of a tile, C columns in, D columns out, I tiles.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from camera.moe.grouped.products import padded_width
from camera.runtime.device.accelerator import current_device
from camera.runtime.device.staging import on_device

TILE_ROWS = (32, 64, 128)
ROWS_FOR_TILE = 4  # an expert has so many tiles on average: half of one is filled up in vain
TOGETHER = tl.constexpr(8)  # tiles that go through the columns side by side, for the L2 cache
VARYING = {None: 0, "in": 1, "out": 2}
# Within 100 KB of shared memory (SM 8.6, 8.9), which takes stages * (rows + columns) * depth.
HALF = [
    triton.Config({"COLUMNS": 128, "DEPTH": 32}, num_warps=4, num_stages=4),
    triton.Config({"COLUMNS": 128, "DEPTH": 64}, num_warps=8, num_stages=3),
]
FULL = [triton.Config({"COLUMNS": 64, "DEPTH": 16}, num_warps=8, num_stages=3)]


@triton.jit
def _kernel(
    x,
    weight,
    y,
    tile,
    tiles,
    C,
    D,
    x_row,
    x_column,
    weight_group,
    weight_row,
    weight_column,
    VARIES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    bands = TOGETHER * tl.cdiv(D, COLUMNS)
    program = tl.program_id(0)
    above = program // bands * TOGETHER
    height = tl.minimum(tiles - above, TOGETHER)
    of_tile = tile + 4 * (above + program % bands % height)
    start, first = tl.load(of_tile).to(tl.int64), tl.load(of_tile + 1)
    last, width = tl.load(of_tile + 2), tl.load(of_tile + 3)
    columns_in, columns_out = C, D
    if VARIES == 1:
        columns_in = width
    if VARIES == 2:
        columns_out = width

    row_N = first + tl.arange(0, ROWS)
    column_D = program % bands // height * COLUMNS + tl.arange(0, COLUMNS)
    step_C = tl.arange(0, DEPTH)
    real_N, wide_N = row_N < last, row_N.to(tl.int64)
    x_NC = x + wide_N[:, None] * x_row + step_C[None, :] * x_column
    weight_CD = weight + start * weight_group
    weight_CD += step_C[:, None] * weight_row + column_D[None, :] * weight_column
    sum_ND = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for done in range(0, columns_in, DEPTH):
        there_NC = real_N[:, None] & (step_C < C - done)[None, :]
        there_CD = (step_C < columns_in - done)[:, None] & (column_D < columns_out)[None, :]
        left_NC = tl.load(x_NC, mask=there_NC, other=0.0)
        right_CD = tl.load(weight_CD, mask=there_CD, other=0.0)
        sum_ND = tl.dot(left_NC, right_CD, sum_ND, input_precision=PRECISION)
        x_NC += DEPTH * x_column
        weight_CD += DEPTH * weight_row
    y_ND = y + wide_N[:, None] * D + column_D[None, :]
    tl.store(y_ND, sum_ND.to(y.dtype.element_ty), mask=real_N[:, None] & (column_D < D)[None, :])


def _tuned(configs: list[triton.Config]) -> triton.runtime.KernelInterface:
    # the interpreter has no clock to choose by
    configs = configs[:1] if triton.knobs.runtime.interpret else configs
    return triton.autotune(configs, key=["ROWS", "VARIES"])(_kernel)


_half, _full = _tuned(HALF), _tuned(FULL)


class GroupedGemm(torch.autograd.Function):
    """y_RD: rows [first, last) of each expert times its matrix of weight_ECD, of any strides."""

    @staticmethod
    def forward(ctx, x_RC, weight_ECD, bounds):
        ctx.save_for_backward(x_RC, weight_ECD)
        ctx.bounds = bounds
        return _equal(x_RC, weight_ECD, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RD):
        x_RC, weight_ECD = ctx.saved_tensors
        dx_RC = dweight_ECD = None
        if ctx.needs_input_grad[0]:
            dx_RC = _equal(dy_RD, weight_ECD.transpose(1, 2), ctx.bounds)
        if ctx.needs_input_grad[1]:
            pairs = [(x_RC[slice(*here)], dy_RD[slice(*here)]) for here in ctx.bounds]
            dweight_ECD = torch.stack([x_NC.t() @ dy_ND for x_NC, dy_ND in pairs])
        return dx_RC, dweight_ECD, None


def grouped_gemm(
    x_RC: torch.Tensor, weight_ECD: torch.Tensor, bounds: list[tuple[int, int]]
) -> torch.Tensor:
    """y_RD: rows [first, last) of each expert times its matrix, of any strides."""
    return GroupedGemm.apply(x_RC, weight_ECD, bounds)


def ragged_gemm(
    x_RC: torch.Tensor,
    table: torch.Tensor,
    starts: Sequence[int],
    widths: Sequence[int],
    bounds: list[tuple[int, int]],
    varies: Literal["in", "out"],
) -> torch.Tensor:
    """`looped_ragged_products` in one launch."""
    if varies == "in":
        strides, columns = table.stride(), table.shape[1]
    else:
        strides, columns = table.stride()[::-1], padded_width(widths)
    strides = (table.stride(0), *strides)
    return _launched(x_RC, table, strides, columns, bounds, starts, widths, varies)


def _equal(
    x_RC: torch.Tensor, weight_ECD: torch.Tensor, bounds: list[tuple[int, int]]
) -> torch.Tensor:
    experts = range(len(bounds))
    strides, columns = weight_ECD.stride(), weight_ECD.shape[2]
    return _launched(x_RC, weight_ECD, strides, columns, bounds, experts, experts, None)


def _launched(
    x_RC: torch.Tensor,
    weight: torch.Tensor,
    strides: tuple[int, int, int],
    columns: int,
    bounds: list[tuple[int, int]],
    starts: Sequence[int],
    widths: Sequence[int],
    varies: str | None,
) -> torch.Tensor:
    """`strides` of weights: of what `starts` count, of a column in, of a column out."""
    y_RD = x_RC.new_empty(len(x_RC), columns)
    rows = tile_rows(bounds)
    tile_I4 = tiles_of(bounds, starts, widths, rows)
    tiles, kernel = len(tile_I4), _half if x_RC.element_size() == 2 else _full
    if not tiles or not columns:
        return y_RD
    with current_device(x_RC.device):
        kernel[lambda meta: (tiles * triton.cdiv(columns, meta["COLUMNS"]),)](
            x_RC,
            weight,
            y_RD,
            on_device(tile_I4, x_RC.device),
            tiles,
            x_RC.shape[1],
            columns,
            *x_RC.stride(),
            *strides,
            VARIES=VARYING[varies],
            PRECISION="ieee",
            ROWS=rows,
        )
    return y_RD


def tile_rows(bounds: list[tuple[int, int]]) -> int:
    """Rows of a tile: the most of which few experts fill one up in vain."""
    counts = [last - first for first, last in bounds if last > first]
    mean = sum(counts) / max(len(counts), 1)
    return max(rows for rows in TILE_ROWS if rows == TILE_ROWS[0] or ROWS_FOR_TILE * rows <= mean)


def tiles_of(
    bounds: list[tuple[int, int]], starts: Sequence[int], widths: Sequence[int], rows: int
) -> torch.Tensor:
    """tile_I4, on the host: the start of its expert's weights, its first row, the expert's last,
    the expert's width; none for an expert without rows."""
    first_E, last_E = torch.tensor(bounds).unbind(1)
    tiles_E = (last_E - first_E + rows - 1) // rows
    expert_I = torch.arange(len(bounds)).repeat_interleave(tiles_E)
    step_I = torch.arange(len(expert_I)) - (tiles_E.cumsum(0) - tiles_E)[expert_I]
    of_E = (torch.tensor(starts), first_E, last_E, torch.tensor(widths))
    tile_I4 = torch.stack([value_E[expert_I] for value_E in of_E], 1)
    tile_I4[:, 1] += rows * step_I
    return tile_I4.int()
