"""The Triton kernel of grouped products is a product for each expert, whatever rows it has."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from camera.moe.grouped.products import (
    grouped_products,
    looped_products,
    looped_ragged_products,
    ragged_products,
)

# experts without rows, of few, of more than one tile, and of no whole number of them
COUNTS = [[0, 5, 33, 0, 70, 1], [0, 0, 3], [200, 0, 150, 9]]
CLOSE = {
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
}


def bounds_of(counts: list[int]) -> list[tuple[int, int]]:
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return list(pairwise(ends))


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=draw).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", CLOSE)
def test_the_kernel_is_the_loop_in_double_precision(dtype, counts, transposed, interpreted):
    bounds, experts = bounds_of(counts), len(counts)
    columns_in, columns_out = (48, 130) if transposed else (50, 20)  # no whole tiles
    x_RC = drawn(sum(counts), 3 * columns_in, dtype=dtype)[:, columns_in : 2 * columns_in]
    weight_ECD = drawn(experts, columns_in, columns_out, dtype=dtype)
    if transposed:
        weight_ECD = weight_ECD.transpose(1, 2).contiguous().transpose(1, 2)
    y_RD = grouped_products(x_RC, weight_ECD, bounds)
    expected = looped_products(x_RC.double(), weight_ECD.double(), bounds)
    assert interpreted.launched == 1
    assert y_RD.dtype == dtype and y_RD.is_contiguous()
    torch.testing.assert_close(y_RD.double(), expected, **CLOSE[dtype])


@pytest.mark.parametrize("varies", ["in", "out"])
@pytest.mark.parametrize("dtype", CLOSE)
def test_experts_of_unequal_widths_are_one_launch(dtype, varies, interpreted):
    counts, widths, hidden = [0, 40, 3, 70, 5], [7, 0, 140, 33, 1], 50
    bounds, table = bounds_of(counts), drawn(sum(widths) + 9, hidden, dtype=dtype)
    starts = [174, 0, 34, 1, 0]  # in any order, and a row that is nobody's
    x_RC = drawn(sum(counts), max(widths) if varies == "in" else hidden, dtype=dtype)
    asked = starts, widths, bounds, varies
    found = ragged_products(x_RC, table, *asked)
    expected = looped_ragged_products(x_RC.double(), table.double(), *asked)
    assert interpreted.launched == 1
    torch.testing.assert_close(found.double(), expected, **CLOSE[dtype])


def test_gradients_are_those_of_the_loop(interpreted):
    bounds = bounds_of(COUNTS[0])
    x_RC, weight_ECD = drawn(sum(COUNTS[0]), 20), drawn(len(COUNTS[0]), 30, 20).transpose(1, 2)
    dy_RD, found = drawn(sum(COUNTS[0]), 30), []
    for products in (grouped_products, looped_products):
        inputs = [part.detach().requires_grad_() for part in (x_RC, weight_ECD)]
        found.append(torch.autograd.grad(products(*inputs, bounds), inputs, dy_RD))
    assert interpreted.launched == 2  # forward, and the inputs' gradient
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_every_row_is_in_one_tile_of_its_own_expert(interpreted):
    from camera.moe.grouped.grouped_gemm import TILE_ROWS, tile_rows, tiles_of

    for counts in COUNTS:
        bounds, experts = bounds_of(counts), range(len(counts))
        for rows in TILE_ROWS:
            tiles = tiles_of(bounds, experts, [9 * e for e in experts], rows).tolist()
            for expert, (first, last) in enumerate(bounds):
                own = [tile for tile in tiles if tile[0] == expert]
                assert [tile[1] for tile in own] == list(range(first, last, rows))
                assert all(tile[2:] == [last, 9 * expert] for tile in own)
    assert [tile_rows([(0, n), (n, n)]) for n in (1, 255, 256, 5000)] == [32, 32, 64, 128]


SHARED = 99 * 1024  # bytes of a block on SM 8.6 and 8.9, the least of these cards


def test_it_compiles_for_cards_that_are_not_here(tmp_path):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.machine.compile_kernel"],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    taken = [int(line) for line in done.stdout.split()]
    assert len(taken) == 8 and min(taken) > 0 and max(taken) <= SHARED
