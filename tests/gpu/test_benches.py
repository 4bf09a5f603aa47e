"""Energies and GPTQ on a card, by the benchmarks of the same names."""

import argparse

import pytest

from experiments.bench import energy, gptq
from experiments.bench.support.layers import SHAPES

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
    assert found["same"] and found["ratio"] > 1


def test_experts_are_quantised_faster_together(card, measured):
    found = ran(gptq, "--scale", "4", "--threads", "0", "--device", card)
    measured("GPTQ of 64 experts, together against one by one", "1/4 widths", found["ratio"], "×")
    assert found["ratio"] > 1
