"""Figures of a run: what they are drawn from, and that they can be drawn for any shape of model."""

import json
from colorsys import rgb_to_hls
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import colors, image

from camera.calibration.scores.energy import EnergyStatistics
from camera.calibration.statistics import Statistics
from experiments.figures.over_layers.energies import draw_energies
from experiments.figures.over_layers.experts import draw_bits, draw_expert_energies, draw_widths
from experiments.figures.over_layers.kinds import draw_energy_of_kinds, draw_kept
from experiments.figures.over_layers.layers import by_layer
from experiments.figures.run import draw_run
from experiments.figures.style import (
    COLOURS,
    COLUMN,
    DARK,
    DPI,
    MARKERS,
    METHODS,
    PAGE,
    for_both_schemes,
    looks,
    variant_of,
)
from experiments.records.energy_summary import (
    BINS,
    PERCENTS,
    Histogram,
    keep_energies,
    read_energies,
    top_shares,
)

pytestmark = pytest.mark.drawn


def layer(*values: float, widths: tuple[int, ...] = (), number: int = 0) -> EnergyStatistics:
    """A layer whose micro-experts have these energies at alpha 0, and none at alpha 1."""
    widths = widths or (len(values),)
    return EnergyStatistics(
        groups={f"model.layers.{number}.mlp.experts": list(widths)},
        sum2_N=torch.tensor(values, dtype=torch.float64),
        max2_N=torch.zeros(len(values)),
        basis_N=torch.ones(len(values)),
        tokens_E=torch.ones(len(widths), dtype=torch.int64),
    )


def kept_histograms(layers: dict[int, EnergyStatistics], folder: Path) -> dict[int, Histogram]:
    """What a run keeps of these energies."""
    seen = folder / "energies.safetensors"
    Statistics(layers, {}).save(seen)
    keep_energies(seen, 0.0, folder)
    return read_energies(folder).histograms


def test_histograms_count_every_micro_expert_over_one_range(tmp_path):
    layers = {3: layer(1e-4, 1.0, 0.0), 1: layer(10.0, 100.0, 1000.0, 0.1)}
    histograms = kept_histograms(layers, tmp_path)
    assert list(histograms) == [1, 3]
    assert histograms[1].counts.sum() == 4 and histograms[1].zeros == 0
    assert histograms[3].counts.sum() == 2 and histograms[3].zeros == 1
    assert np.array_equal(histograms[1].edges, histograms[3].edges)
    assert histograms[1].edges[[0, -1]] == pytest.approx([-4, 3])


@pytest.mark.parametrize("energies", [(0.0, 0.0), (2.0,), (1e-12, 1e12)])
def test_any_energies_can_be_drawn(energies, tmp_path):
    histograms = kept_histograms({0: layer(*energies)}, tmp_path)
    assert len(histograms[0].counts) == BINS
    assert image.imread(draw_energies(histograms, "", tmp_path / "energies.png")).size


def test_experts_without_energy_can_be_drawn(tmp_path):
    energies = {"model.layers.0.mlp.experts": [0.0, 0.0]}
    assert image.imread(draw_expert_energies(energies, "", tmp_path / "experts.png")).size


def test_the_top_share_is_that_of_the_largest_summed():
    energies = np.random.default_rng(0).pareto(1.0, 200)
    for count in (1, 7, 100, 200):
        largest = sum(sorted(energies, reverse=True)[:count])
        (share,) = top_shares(energies, np.array([100 * count / 200]))
        assert share == pytest.approx(largest / energies.sum())


def test_top_shares_rise_to_one_and_lie_above_the_share_of_equals():
    shares = top_shares(np.random.default_rng(1).exponential(size=57))
    assert (np.diff(shares) > 0).all() and shares[-1] == pytest.approx(1)
    assert (shares >= PERCENTS / 100 - 1e-12).all()
    assert top_shares(np.full(9, 3.0)) == pytest.approx(PERCENTS / 100)
    assert not top_shares(np.zeros(9)).any()


def test_a_runs_energies_are_drawn_when_its_checkpoint_is_gone(tmp_path):
    seen = tmp_path / "statistics.safetensors"
    layers = {0: layer(1.0, 2.0, 4.0, 8.0, widths=(3, 1)), 1: layer(5.0, 0.0, number=1)}
    Statistics(layers, {}).save(seen)
    run = tmp_path / "run"
    run.mkdir()
    keep_energies(seen, 0.0, run)
    seen.unlink()
    kept = read_energies(run)
    first, second = kept.histograms[0], kept.histograms[1]
    assert np.array_equal(first.counts, np.histogram(np.log10([1, 2, 4, 8]), first.edges)[0])
    assert second.counts.sum() == 1
    assert kept.histograms[1].zeros == 1
    assert kept.experts == {
        "model.layers.0.mlp.experts": [7.0, 8.0],
        "model.layers.1.mlp.experts": [5.0],
    }
    assert kept.top[1][-1] == 1
    assert names(draw_run(run)) == {
        "energies",
        "energy_shares",
        "expert_energies",
        "layer_energies",
    }


def test_a_run_is_drawn_from_its_report_as_far_as_that_shows_something(tmp_path):
    path = "model.layers.0.mlp.experts"
    report = {"widths": {path: [4, 4]}, "full_widths": {path: 4}, "layers": {}}
    assert draw_run(tmp_path) == []
    (tmp_path / "compress.json").write_text(json.dumps(report))
    assert draw_run(tmp_path) == []  # nothing was removed
    report |= {"widths": {path: [4, 0]}, "layers": {"0": {"mean_bits": {path: [2.0, 3.0]}}}}
    (tmp_path / "compress.json").write_text(json.dumps(report))
    drawn = draw_run(tmp_path)
    assert names(drawn) == {"widths", "kept_widths", "bits"}
    for file in drawn:
        assert image.imread(file).size
        assert file.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
        assert ElementTree.parse(file.with_suffix(".svg")).getroot().tag.endswith("svg")


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
    assert by_layer(widths) == ({0: [60], 1: [10]}, {1: [4, 0, 8]})
    assert image.imread(draw_widths(widths, full, "", tmp_path / "widths.png")).size
    assert image.imread(draw_bits(widths, "", tmp_path / "bits.png")).size


@pytest.mark.filterwarnings("error")
def test_a_name_in_a_script_that_the_font_lacks_is_no_warning(tmp_path):
    widths = {"model.layers.0.mlp": [3]}
    file = draw_widths(widths, {"model.layers.0.mlp": 4}, "模型", tmp_path / "a.png")
    assert "模型" in file.with_suffix(".svg").read_text(encoding="utf-8")


def test_a_dense_model_and_a_large_one_can_be_drawn(tmp_path):
    draw_widths({"model.layers.0.mlp": [3]}, {"model.layers.0.mlp": 4}, "", tmp_path / "a.png")
    layers = [f"model.layers.{number}.mlp.experts" for number in range(48)]
    large = {name: list(range(128)) for name in layers}
    draw_widths(large, dict.fromkeys(layers, 128), "", tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size < 200_000


@pytest.mark.parametrize("layers", [2, 48])
def test_figures_are_as_wide_as_a_column_or_a_page_and_shorter_than_one(layers, tmp_path):
    paths = [f"model.layers.{layer}.mlp.experts" for layer in range(layers)]
    widths = {path: [1, 2, 3] for path in paths}
    full = dict.fromkeys(paths, 4)
    edges = np.linspace(-1, 1, 9)
    histograms = {layer: Histogram(np.arange(8), edges, 1) for layer in range(layers)}
    words = "a model · a method · 40 % of the experts removed · calibrated on a text " * 3
    files = [
        draw_energies(histograms, words, tmp_path / "a.png"),
        draw_widths(widths, full, words, tmp_path / "b.png"),
        draw_kept(widths, full, words, tmp_path / "c.png"),
        draw_energy_of_kinds(widths, words, tmp_path / "d.png"),
    ]
    for file in files:
        height, width = image.imread(file).shape[:2]
        assert width / DPI in (pytest.approx(COLUMN, abs=0.01), pytest.approx(PAGE, abs=0.01))
        assert 1.5 < height / DPI < 5.5


def test_the_kept_share_of_a_layer_is_that_of_its_kind(tmp_path):
    path, shared = "model.layers.0.mlp.experts", "model.layers.0.mlp.shared_expert"
    draw_kept({path: [4, 2], shared: [1]}, {path: 4, shared: 2}, "", tmp_path / "kept.png")
    style, text = '<style type="text/css">*{}</style>', '<text style="fill: #1b1f24">#1b1f24</text>'
    found = for_both_schemes(f"<svg>{style}{text}</svg>")
    assert 'style="fill: var(--c1b1f24)">#1b1f24<' in found
    assert "--c1b1f24:#1b1f24;" in found and f"--c1b1f24:{DARK['#1b1f24']};" in found
    assert found.index("prefers-color-scheme:dark") > found.index("--c1b1f24:#1b1f24;")


def test_a_method_looks_the_same_in_every_company_and_like_no_other():
    everyone = looks([*METHODS, "my_own", "dense"])
    assert looks(["mc"])["mc"] == everyone["mc"]
    assert len({(look.colour, look.marker) for look in everyone.values()}) == len(everyone)
    assert len({everyone[method].marker for method in METHODS}) == len(METHODS) <= len(MARKERS)


def test_variants_of_a_method_have_its_colour_and_a_marker_each():
    look = looks(["heapr"])["heapr"]
    variants = [variant_of(look, number) for number in range(12)]
    assert variants[0] == look and {variant.colour for variant in variants} == {look.colour}
    assert len({(variant.marker, variant.filled) for variant in variants}) == 12


def test_colours_can_be_seen_on_white_paper():
    lightness = [rgb_to_hls(*colors.to_rgb(colour))[1] for colour in COLOURS]
    assert max(lightness) < 0.8


def names(files):
    return {file.stem for file in files}
