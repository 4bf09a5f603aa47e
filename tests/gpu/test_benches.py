"""Energies and GPTQ on a card, by the benchmarks of the same names."""

import argparse
from itertools import accumulate, pairwise

import pytest
import torch
from torch.nn import functional as F

from camera.moe.grouped import phi
from camera.moe.grouped.products import looped_products, looped_ragged_products, padded_width
from camera.runtime.device import compiled
from camera.runtime.device.compiled import has_compiler
from experiments.bench import energy, gptq
from experiments.bench.support.layers import SHAPES
from experiments.bench.support.timing import take_turns

pytestmark = pytest.mark.gpu


def ran(benchmark, *words: str) -> dict:
    parser = argparse.ArgumentParser()
    benchmark.arguments(parser)
    return benchmark.run(parser.parse_args(words))


@pytest.mark.parametrize("shape", SHAPES)
def test_energies_of_routed_tokens_outrun_the_dense_way(shape, card, measured):
    words = ("--shapes", shape, "--scale", "1", "--repeats", "3", "--threads", "0")
    found = ran(energy, *words, "--device", card)["shapes"][shape]
    title = "energies against every expert on every token, fp32, 8192 tokens"
    measured(title, shape, found["ratio"], "×", f"E / k = {found['goal']}")
    measured(title, f"{shape}: of the matmul peak", 100 * found["of_peak"], "%", "50")
    measured("energies, experts together against one by one", shape, found["together_ratio"], "×")
    assert found["same"] and found["ratio"] > 1


def test_phi_compiled_is_phi_operator_by_operator(card, measured, monkeypatch):
    if not has_compiler(torch.device(card)):
        pytest.skip(f"torch has no compiler for {card}")
    monkeypatch.setattr(compiled, "LARGE", 1)
    gate, up = torch.randn(65536, 2 * 768, device=card).chunk(2, 1)
    asked = gate, up, torch.rand(len(gate), device=card), F.silu, True
    for one, other in zip(phi.phi_of(*asked), phi._phi(*asked), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    sides = {"compiled": lambda: phi.phi_of(*asked), "eager": lambda: phi._phi(*asked)}
    took = take_turns(sides, 5, card)
    measured("phi and its squares, compiled", "65536 x 768", took["eager"] / took["compiled"], "×")


EXPERTS, HIDDEN, WIDTH, ROWS = 128, 2048, 768, 65536  # of Qwen3-30B-A3B, 8192 tokens
CLOSE = {torch.bfloat16: dict(rtol=2e-2, atol=0.5), torch.float32: dict(rtol=1e-4, atol=1e-3)}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_one_kernel_of_all_experts_is_a_product_for_each(dtype, card, measured):
    if not has_compiler(torch.device(card)):
        pytest.skip(f"torch has no compiler for {card}")
    from camera.moe.grouped.grouped_gemm import grouped_gemm, ragged_gemm

    draw = torch.Generator().manual_seed(0)
    shares_E = torch.rand(EXPERTS, generator=draw) ** 3  # a few experts have most tokens
    ends = (ROWS * shares_E.cumsum(0) / shares_E.sum()).long().tolist()
    ends[-1] = ROWS
    bounds = list(pairwise([0, *ends]))
    x_RC = torch.randn(ROWS, HIDDEN, device=card, dtype=dtype)
    weight_EDC = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, device=card, dtype=dtype)
    asked = x_RC, weight_EDC.transpose(1, 2), bounds
    torch.testing.assert_close(grouped_gemm(*asked), looped_products(*asked), **CLOSE[dtype])
    took = take_turns(
        {"kernel": lambda: grouped_gemm(*asked), "loop": lambda: looped_products(*asked)}, 5, card
    )
    title = f"products of {EXPERTS} experts of unequal tokens, one kernel against one for each"
    measured(title, str(dtype), took["loop"] / took["kernel"], "×")

    widths = torch.randint(0, 2 * WIDTH, (EXPERTS,), generator=draw).tolist()
    starts = [0, *accumulate(widths)][:-1]
    uneven = weight_EDC.view(-1, HIDDEN), starts, widths, bounds
    for varies, x in (("out", x_RC), ("in", x_RC[:, : padded_width(widths)])):
        expected = looped_ragged_products(x, *uneven, varies)
        torch.testing.assert_close(ragged_gemm(x, *uneven, varies), expected, **CLOSE[dtype])


def test_experts_are_quantised_faster_together(card, measured):
    found = ran(gptq, "--scale", "4", "--threads", "0", "--device", card)
    measured("GPTQ of 64 experts, together against one by one", "1/4 widths", found["ratio"], "×")
    assert found["ratio"] > 1
