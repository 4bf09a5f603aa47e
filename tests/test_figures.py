"""Figures: what they are drawn from, and that they can be drawn for any shape of model."""

import numpy as np
import pytest
import torch
from matplotlib import image

from experiments.figures import _by_layer, draw_bits, draw_energies, draw_widths
from experiments.histograms import BINS, energy_histograms


class Layer:
    def __init__(self, *values: float) -> None:
        self.values = torch.tensor(values, dtype=torch.float64)

    def energy(self, alpha: float) -> torch.Tensor:
        return alpha * self.values


class Energies:
    def __init__(self, **layers: Layer) -> None:
        self.layers = {int(name[1:]): layer for name, layer in layers.items()}


def test_histograms_count_every_micro_expert_over_one_range():
    energies = Energies(l3=Layer(1e-4, 1.0, 0.0), l1=Layer(10.0, 100.0, 1000.0, 0.1))
    histograms = energy_histograms(energies, 1.0)
    assert list(histograms) == [1, 3]
    assert histograms[1].counts.sum() == 4 and histograms[1].zeros == 0
    assert histograms[3].counts.sum() == 2 and histograms[3].zeros == 1
    assert np.array_equal(histograms[1].edges, histograms[3].edges)
    assert histograms[1].edges[[0, -1]] == pytest.approx([-4, 3])


@pytest.mark.parametrize("layer", [Layer(0.0, 0.0), Layer(2.0), Layer(1e-12, 1e12)])
def test_any_energies_can_be_drawn(layer, tmp_path):
    histograms = energy_histograms(Energies(l0=layer), 0.9)
    assert len(histograms[0].counts) == BINS
    assert image.imread(draw_energies(histograms, tmp_path / "energies.png")).size


def test_shared_and_dense_modules_stand_apart_from_routed_experts(tmp_path):
    widths = {
        "model.layers.0.mlp": [60],
        "model.layers.1.mlp.experts": [4, 0, 8],
        "model.layers.1.mlp.shared_expert": [10],
    }
    full = {
        "model.layers.0.mlp": 64,
        "model.layers.1.mlp.experts": 8,
        "model.layers.1.mlp.shared_expert": 20,
    }
    assert _by_layer(widths) == ({0: [60], 1: [10]}, {1: [4, 0, 8]})
    assert image.imread(draw_widths(widths, full, tmp_path / "widths.png")).size
    assert image.imread(draw_bits(widths, tmp_path / "bits.png")).size


def test_a_dense_model_and_a_large_one_can_be_drawn(tmp_path):
    draw_widths({"model.layers.0.mlp": [3]}, {"model.layers.0.mlp": 4}, tmp_path / "a.png")
    names = [f"model.layers.{layer}.mlp.experts" for layer in range(48)]
    large = {name: list(range(128)) for name in names}
    draw_widths(large, dict.fromkeys(names, 128), tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size
