"""Figures over runs: which points they have, what makes a line, and when there is none."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import image, pyplot
from PIL import Image

from camera.calibration.scores.energy import EnergyStatistics
from camera.calibration.statistics import Statistics
from experiments.figures.__main__ import main
from experiments.figures.comparison import draw_comparisons
from experiments.figures.over_runs.curves import draw_curves
from experiments.figures.over_runs.points import (
    ALPHA,
    BITS,
    SAMPLES,
    SPARSITY,
    Measure,
    Reference,
    points,
)
from experiments.figures.over_runs.scale import honest_limits
from experiments.figures.over_runs.sizes import draw_sizes, front
from experiments.figures.style import STYLE, canvas, legend
from experiments.figures.words import Heading
from experiments.records.energy_summary import keep_energies
from experiments.records.files import OutputFolder
from experiments.tables.aggregate import over_seeds
from experiments.tables.rows import read_runs
from tests.helpers.runs.run_folders import add

AVERAGE = Measure("average", "average")
WIKI = Measure("wikitext2", "perplexity", log=True)
NUMBERED = (("tiny_moe", ""), ("tiny_moe", "-2"), ("tiny_moe", "-3"), ("a_b", ""))


def draw(output):
    """The names of the figures that are drawn over its runs."""
    runs = read_runs(OutputFolder(output).runs())
    return {file.stem for file in draw_comparisons(runs, output / "figures")}


def points_of(output, axis, measure=AVERAGE):
    return points(over_seeds(read_runs(OutputFolder(output).runs())), axis, measure)


def metrics(folder, **changes):
    file = folder / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_line_goes_through_the_realised_sparsities_of_a_method(tmp_path):
    for sparsity in (0.4, 0.2):
        run = add(tmp_path, f"a{sparsity}", "naee", sparsity, tasks={"boolq": 100 * sparsity})
        realised = {"moe": sparsity - 0.01, "model": 0.1, "routed": 0.3}
        metrics(run, sparsity=realised)
    add(tmp_path, "dense", "dense")
    found = points_of(tmp_path, SPARSITY["moe"])
    assert found["x"].tolist() == pytest.approx([19, 39])
    assert found["y"].tolist() == pytest.approx([20, 40])
    assert set(found["label"]) == {"NAEE"}


def test_error_bars_are_of_seeds_where_there_are_several_else_of_the_score(tmp_path):
    for seed, score in enumerate((50.0, 60.0, 70.0)):
        add(tmp_path, f"s{seed}", "camera_p", 0.2, seed=seed, tasks={"boolq": score})
    add(tmp_path, "one", "camera_p", 0.4, tasks={"boolq": 50.0}, questions=101)
    found = points_of(tmp_path, SPARSITY["moe"])
    assert found["y"].tolist() == pytest.approx([60, 50])
    assert found["error"].tolist() == pytest.approx([10, 5])  # 100 * sqrt(0.5 * 0.5 / 100)


def test_perplexity_of_one_seed_has_no_error(tmp_path):
    for sparsity in (0.2, 0.4):
        add(tmp_path, f"a{sparsity}", "random", sparsity)
    assert points_of(tmp_path, SPARSITY["moe"], WIKI)["error"].isna().all()


def test_quantised_runs_stand_over_bits_and_pruned_ones_over_sparsity(tmp_path):
    for i, bits in enumerate((2.25, 3.25)):
        add(tmp_path, f"q{i}", "gptq", bits=bits)
        add(tmp_path, f"p{i}", "naee", 0.2 + 0.2 * i)
    assert set(points_of(tmp_path, BITS)["method"]) == {"gptq"}
    assert points_of(tmp_path, BITS)["x"].tolist() == [2.25, 3.25]
    assert set(points_of(tmp_path, SPARSITY["moe"])["method"]) == {"naee"}


def test_a_setting_tried_at_one_ratio_is_no_line_over_ratios(tmp_path):
    for sparsity in (0.2, 0.4):
        for alpha in (0.0, 0.5):
            add(tmp_path, f"{alpha}{sparsity}", "camera_p", sparsity, alpha=alpha)
    add(tmp_path, "tried", "camera_p", 0.4, alpha=1.0)
    add(tmp_path, "single", "naee", 0.4)
    found = points_of(tmp_path, SPARSITY["moe"])
    assert set(found["label"]) == {"Camera-P, α=0", "Camera-P, α=0.5", "NAEE"}
    assert set(found.loc[found["method"] == "camera_p", "variant"]) == {0, 1}


def test_what_most_lines_of_a_method_have_is_left_out_of_labels(tmp_path):
    for sparsity in (0.2, 0.4):
        for alpha, scope in ((0.9, "layer"), (0.9, "global"), (0.5, "layer")):
            settings = {"alpha": alpha, "rank_scope": scope}
            add(tmp_path, f"{alpha}{scope}{sparsity}", "camera_p", sparsity, **settings)
    found = points_of(tmp_path, SPARSITY["moe"])
    labels = {"Camera-P", "Camera-P, rank_scope=global", "Camera-P, α=0.5"}
    assert set(found["label"]) == labels
    assert set(found.loc[found["label"] == "Camera-P", "variant"]) == {0}


def test_a_long_legend_takes_no_room_from_what_it_explains(tmp_path, drawn):
    heights = []
    more = ", rank_scope=global, expert_widths=uniform, batch=16"  # wider than the figure
    for lines, end in ((2, ""), (40, ""), (6, more)):
        with pyplot.rc_context(STYLE):
            figure, (axes,) = canvas(Heading("a", "b"), 3.35, 2.7)
            for line in range(lines):
                label = f"a method with many settings, number {line}{end}"
                axes.plot([0, 1], [0, line], label=label)
            legend(figure)
            figure.draw_without_rendering()
            heights.append(axes.get_window_extent().height / figure.dpi)
            (drawn,) = figure.legends
            assert drawn.get_window_extent().x0 >= 0
            assert drawn.get_window_extent().x1 <= figure.bbox.x1
            pyplot.close(figure)
    assert min(heights) >= 0.95 * heights[0]


def test_alpha_has_a_line_for_each_ratio_and_only_where_it_varies(tmp_path):
    for alpha in (0.0, 0.5, 1.0):
        for sparsity in (0.2, 0.4):
            add(tmp_path, f"{alpha}{sparsity}", "camera_p", sparsity, alpha=alpha)
        add(tmp_path, f"q{alpha}", "camera_q", bits=2.5, alpha=alpha)
    add(tmp_path, "more", "camera_p", 0.6, alpha=0.5)
    add(tmp_path, "other", "naee", 0.4)
    found = points_of(tmp_path, ALPHA)
    assert set(found["label"]) == {"Camera-P 20 %", "Camera-P 40 %", "Camera-Q 2.5 bits"}
    assert found.groupby("label")["x"].apply(list).tolist() == 3 * [[0.0, 0.5, 1.0]]


def test_calibration_sizes_have_a_line_for_each_text(tmp_path):
    for source in ("wikitext2", "c4"):
        for samples in (16, 128):
            calibration = {"source": source, "samples": samples}
            add(tmp_path, f"{source}{samples}", "camera_p", 0.4, calibration=calibration)
    found = points_of(tmp_path, SAMPLES)
    labels = {"Camera-P 40 %, text=C4", "Camera-P 40 %, text=WikiText-2"}
    assert set(found["label"]) == labels
    assert set(found["x"]) == {16, 128}


def test_one_ratio_of_all_is_bars_and_of_one_run_alone_no_figure(tmp_path, drawn):
    add(tmp_path, "a", "naee", 0.4)
    assert points_of(tmp_path, SPARSITY["moe"]).empty
    assert draw(tmp_path) == set() and not (tmp_path / "figures").exists()
    add(tmp_path, "b", "camera_p", 0.4)
    assert points_of(tmp_path, ALPHA).empty
    found = points_of(tmp_path, SPARSITY["moe"])
    assert set(found["method"]) == {"naee", "camera_p"} and found["asked"].nunique() == 1
    assert {f"tiny_moe-main-{score}-sparsity" for score in ("c4", "average")} <= draw(tmp_path)


def test_what_was_asked_alike_stands_alike_although_it_came_out_otherwise(tmp_path):
    for number, (method, stored) in enumerate((("camera_q", 2.483), ("gptq", 2.5))):
        run = add(tmp_path, f"q{number}", method, bits=2.5)
        metrics(run, bits={"raw": 2.0, "stored": stored, "model": 4.0})
    found = points_of(tmp_path, BITS)
    assert found["asked"].nunique() == 1 and found["x"].nunique() == 2  # bars, not a trend


def test_the_front_is_what_no_smaller_run_beats():
    draw = np.random.default_rng(0)
    sizes, averages = draw.integers(1, 20, 60), draw.integers(30, 60, 60)
    for better in (1, -1):
        rows = pd.DataFrame({"mb": sizes, "y": averages, "error": np.nan, "better": better})
        expected = {
            (size, average)
            for size, average in zip(sizes, averages, strict=True)
            if not any(
                (s <= size and better * a >= better * average and (s, a) != (size, average))
                for s, a in zip(sizes, averages, strict=True)
            )
        }
        found = front(rows)
        assert set(zip(found["mb"], found["y"], strict=True)) == expected
        assert found["mb"].is_monotonic_increasing


def test_the_front_has_no_step_within_the_error():
    rows = pd.DataFrame({"mb": [1, 2, 3], "y": [50.0, 51.0, 60.0], "error": 1.0, "better": 1})
    assert list(front(rows)["y"]) == [50, 60]


def test_one_size_is_no_front(tmp_path):
    add(tmp_path, "a", "naee", 0.4)
    add(tmp_path, "b", "camera_p", 0.4)
    rows = over_seeds(read_runs(OutputFolder(tmp_path).runs()))
    assert draw_sizes(rows, AVERAGE, Heading("m", ""), tmp_path / "sizes.png") is None


@pytest.mark.parametrize("seed", range(20))
def test_an_axis_spans_five_percent_and_two_errors_to_either_side(seed):
    draw = np.random.default_rng(seed)
    values = draw.uniform(2.8, 2.8 + draw.choice([0.01, 5]), 6)
    errors = draw.choice([np.nan, 0.001, 0.3], 6)
    level = draw.choice([None, 2.83])
    low, high = honest_limits(values, errors, level)
    known = np.nan_to_num(errors)
    assert low <= (values - known).min() and high >= (values + known).max()
    middle = (low + high) / 2 if level is None else level
    usual = np.nanmedian([*errors, 0] if np.isnan(errors).all() else errors)
    for half in (0.05 * middle, 2 * usual):
        assert low <= middle - half * 0.999 and high >= middle + half * 0.999


def test_noise_is_drawn_flat_and_curves_begin_at_the_dense_model(tmp_path, monkeypatch):
    for sparsity, perplexity in ((0.2, 3.048), (0.6, 3.064)):
        add(tmp_path, f"a{sparsity}", "camera_p", sparsity, perplexity={"wikitext2": perplexity})
    kept = []
    monkeypatch.setattr(
        "experiments.figures.over_runs.curves.save", lambda figure, file: kept.append(figure)
    )
    found = points_of(tmp_path, SPARSITY["moe"], WIKI)
    dense = Reference("Dense", 3.046, 0.01)
    draw_curves(found, SPARSITY["moe"], WIKI, Heading("h", "w"), dense, tmp_path / "a.png")
    (axes,) = kept[0].axes
    low, high = axes.get_ylim()
    assert low <= 0.95 * 3.046 and high >= 1.05 * 3.046
    assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1]
    starts = [line.get_xydata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    assert any(start == pytest.approx((0, 3.046)) for start in starts)
    pyplot.close(kept[0])


def test_equal_lines_stand_side_by_side(tmp_path, monkeypatch):
    for sparsity in (0.2, 0.4):
        for method in ("camera_p", "heapr", "naee"):
            add(tmp_path, f"{method}{sparsity}", method, sparsity)
    kept = []
    monkeypatch.setattr(
        "experiments.figures.over_runs.curves.save", lambda figure, file: kept.append(figure)
    )
    found = points_of(tmp_path, SPARSITY["moe"])
    draw_curves(found, SPARSITY["moe"], AVERAGE, Heading("h", "w"), None, tmp_path / "a.png")
    axes = kept[0].axes[0]
    lines = [line for line in axes.lines if line.get_label() in ("Camera-P", "HEAPr", "NAEE")]
    places = {round(line.get_transform().transform(line.get_xydata())[0][0], 1) for line in lines}
    assert len(lines) == len(places) == 3
    pyplot.close(kept[0])


def test_a_heading_says_model_method_ratio_calibration_and_data(tmp_path, drawn):
    for alpha in (0.0, 0.5):
        calibration = {"source": "wikitext2", "samples": 16}
        settings = {"alpha": alpha, "calibration": calibration}
        add(tmp_path, f"a{alpha}", "camera_p", 0.4, **settings)
    draw_comparisons(read_runs(OutputFolder(tmp_path).runs()), tmp_path / "figures")
    with Image.open(tmp_path / "figures" / "tiny_moe-alpha-c4-alpha.png") as figure:
        told = figure.info["Title"].replace("\u00a0", " ")
    for words in (
        "Perplexity of C4 by α",
        "tiny_moe",
        "Camera-P",
        "40 % of the experts removed",
        "calibrated on 16 samples of WikiText-2",
        "32 blocks of each text",
        "100 questions of each of 2 tasks",
    ):
        assert words in told


def test_each_figure_shows_runs_that_can_be_compared(tmp_path):
    for i, sparsity in enumerate((0.2, 0.4)):
        once = {"tasks": {}, "perplexity": {"wikitext2": 9.0}}
        add(tmp_path, f"a{i}", "naee", sparsity, **once)
        add(tmp_path, f"b{i}", "naee", sparsity, **once, sparsity_of="model")
        add(tmp_path, f"c{i}", "naee", sparsity, **once, evaluation={"limit": 5})
        metrics(
            tmp_path / "runs" / f"b{i}", sparsity={"moe": sparsity, "model": sparsity, "routed": 0}
        )
        add(tmp_path, f"d{i}", "naee", sparsity, **once, model="a/b")
    found = {name for name in draw(tmp_path) if "sparsity" in name}
    assert found == {f"{model}-main{n}-wikitext2-sparsity" for model, n in NUMBERED}


def test_speed_has_a_line_for_each_batch_size(tmp_path, drawn):
    for sparsity in (0.2, 0.4):
        run = add(tmp_path, f"a{sparsity}", "camera_p", sparsity, tasks={})
        phase = {"dense": 1.0, "compressed": 2.0, "ratio": 1 + sparsity, "implementation": None}
        batches = {size: {"prefill": phase, "decode": phase} for size in ("1", "16")}
        metrics(run, speed=batches, perplexity={})
    found = draw(tmp_path)
    for phase in ("prefill", "decode"):
        assert {f"tiny_moe-main-{phase}_x-{axis}" for axis in ("batch", "sparsity")} <= found


def test_the_time_of_methods_counts_statistics_that_another_run_gathered(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        "experiments.figures.comparison.draw_durations", lambda seconds, *_: told.append(seconds)
    )
    add(tmp_path, "a", "naee", 0.2)
    run = add(tmp_path, "b", "camera_p", 0.2)
    metrics(
        run,
        seconds={"calibrate": 1, "compress": 2, "evaluate": 9},
        cached_statistics={"seconds": 50, "peak_memory_bytes": 1},
    )
    draw(tmp_path)
    rows = told[0].set_index("method")
    assert rows.loc["camera_p"].to_dict() == {"calibrate": 51, "compress": 2}
    assert rows.loc["naee"].to_dict() == {"calibrate": 60, "compress": 30}


def test_energies_of_several_alphas_are_drawn_together(tmp_path, drawn):
    for alpha in (0.0, 1.0):
        run = add(tmp_path, f"a{alpha}", "camera_p", 0.2, alpha=alpha, tasks={}, perplexity={})
        metrics(run, perplexity={})
        seen = tmp_path / "statistics.safetensors"
        layers = {
            0: EnergyStatistics(
                groups={"model.layers.0.mlp.experts": [3]},
                sum2_N=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
                max2_N=torch.ones(3),
                basis_N=torch.ones(3),
                tokens_E=torch.ones(1, dtype=torch.int64),
            )
        }
        Statistics(layers, {}).save(seen)
        keep_energies(seen, alpha, run)
    assert draw(tmp_path) == {"tiny_moe-alpha-energy_shares"}


def test_the_command_draws_and_says_what(tmp_path, drawn, capsys):
    for sparsity in (0.2, 0.4):
        for method in ("camera_p", "someone's"):
            scores = {"tasks": {"boolq": 30.0}, "perplexity": {}}
            run = add(tmp_path, f"{method[0]}{sparsity}", method, sparsity, **scores)
            metrics(run, bytes={"dense": 9_000_000, "compressed": 9_000_000 * (1 - sparsity)})
    add(tmp_path, "dense", "dense", tasks={"boolq": 60.0}, perplexity={})
    add(tmp_path, "bad", "camera_p", 0.6, error="too much.")
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for figure in ("tiny_moe-main-average-sparsity", "tiny_moe-main-average-size"):
        file = tmp_path / "figures" / f"{figure}.png"
        assert str(file) in printed
        assert image.imread(file).size and file.stat().st_size < 200_000
        assert file.with_suffix(".pdf").exists()


def test_the_command_refuses_a_folder_without_runs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "has no runs" in capsys.readouterr().err


def test_the_command_says_when_there_is_nothing_to_draw(tmp_path, capsys):
    add(tmp_path, "a", "naee", 0.4, done=False)
    assert main([str(tmp_path)]) == 0
    assert "nothing to draw" in capsys.readouterr().out
