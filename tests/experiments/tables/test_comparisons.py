"""Figures over runs: which points they have, what makes a line, and when there is none."""

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib import image, pyplot

from experiments.figures.__main__ import main
from experiments.figures.comparison import draw_comparisons
from experiments.figures.curves import SIZE, legend
from experiments.figures.pareto import draw_pareto, pareto_front
from experiments.figures.points import ALPHA, BITS, SAMPLES, SPARSITY, Measure, points
from experiments.figures.style import STYLE
from experiments.records.files import OutputFolder
from experiments.tables.aggregate import over_seeds
from experiments.tables.rows import read_runs
from tests.helpers.runs.run_folders import add

AVERAGE = Measure("average", "average")
WIKI = Measure("wikitext2", "perplexity", log=True)


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
    assert set(found["label"]) == {"naee"}


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
    assert set(found["label"]) == {"camera_p, alpha=0.0", "camera_p, alpha=0.5", "naee"}
    assert set(found.loc[found["method"] == "camera_p", "variant"]) == {0, 1}


def test_what_most_lines_of_a_method_have_is_left_out_of_labels(tmp_path):
    for sparsity in (0.2, 0.4):
        for alpha, scope in ((0.9, "layer"), (0.9, "global"), (0.5, "layer")):
            settings = {"alpha": alpha, "rank_scope": scope}
            add(tmp_path, f"{alpha}{scope}{sparsity}", "camera_p", sparsity, **settings)
    found = points_of(tmp_path, SPARSITY["moe"])
    labels = {"camera_p", "camera_p, rank_scope=global", "camera_p, alpha=0.5"}
    assert set(found["label"]) == labels
    assert set(found.loc[found["label"] == "camera_p", "variant"]) == {0}


def test_a_long_legend_takes_no_room_from_what_it_explains(tmp_path):
    heights = []
    for lines in (2, 40):
        with pyplot.rc_context(STYLE):
            figure, axes = pyplot.subplots(figsize=SIZE)
            for line in range(lines):
                axes.plot([0, 1], [0, line], label=f"a method with many settings, number {line}")
            legend(figure)
            figure.draw_without_rendering()
            heights.append(axes.get_window_extent().height / figure.dpi)
            pyplot.close(figure)
    assert heights[1] >= 0.95 * heights[0]


def test_alpha_has_a_line_for_each_ratio_and_only_where_it_varies(tmp_path):
    for alpha in (0.0, 0.5, 1.0):
        for sparsity in (0.2, 0.4):
            add(tmp_path, f"{alpha}{sparsity}", "camera_p", sparsity, alpha=alpha)
        add(tmp_path, f"q{alpha}", "camera_q", bits=2.5, alpha=alpha)
    add(tmp_path, "more", "camera_p", 0.6, alpha=0.5)
    add(tmp_path, "other", "naee", 0.4)
    found = points_of(tmp_path, ALPHA)
    assert set(found["label"]) == {"camera_p 20 %", "camera_p 40 %", "camera_q 2.5 bits"}
    assert found.groupby("label")["x"].apply(list).tolist() == 3 * [[0.0, 0.5, 1.0]]


def test_calibration_sizes_have_a_line_for_each_text(tmp_path):
    for source in ("wikitext2", "c4"):
        for samples in (16, 128):
            calibration = {"source": source, "samples": samples}
            add(tmp_path, f"{source}{samples}", "camera_p", 0.4, calibration=calibration)
    found = points_of(tmp_path, SAMPLES)
    labels = {"camera_p 40 %, source=c4", "camera_p 40 %, source=wikitext2"}
    assert set(found["label"]) == labels
    assert set(found["x"]) == {16, 128}


def test_one_ratio_alone_is_no_figure(tmp_path):
    add(tmp_path, "a", "naee", 0.4)
    add(tmp_path, "b", "camera_p", 0.4)
    assert points_of(tmp_path, SPARSITY["moe"]).empty
    assert points_of(tmp_path, ALPHA).empty
    assert draw_comparisons(read_runs(OutputFolder(tmp_path).runs()), tmp_path / "figures") == []
    assert not (tmp_path / "figures").exists()


def test_the_front_is_what_no_smaller_run_beats():
    draw = np.random.default_rng(0)
    sizes, averages = draw.integers(1, 20, 60), draw.integers(30, 60, 60)
    rows = pd.DataFrame({"size_mb": sizes, "average": averages})
    front = {
        (size, average)
        for size, average in zip(sizes, averages, strict=True)
        if not any(
            (s <= size and a >= average and (s, a) != (size, average))
            for s, a in zip(sizes, averages, strict=True)
        )
    }
    found = pareto_front(rows)
    assert set(zip(found["size_mb"], found["average"], strict=True)) == front
    assert found["size_mb"].is_monotonic_increasing


def test_one_size_is_no_front(tmp_path):
    add(tmp_path, "a", "naee", 0.4)
    add(tmp_path, "b", "camera_p", 0.4)
    rows = over_seeds(read_runs(OutputFolder(tmp_path).runs()))
    assert draw_pareto(rows, "m", tmp_path / "pareto.png") is None


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
    drawn = draw_comparisons(read_runs(OutputFolder(tmp_path).runs()), tmp_path / "figures")
    assert {file.stem for file in drawn} == {
        "tiny_moe-wikitext2-sparsity_moe",
        "tiny_moe-wikitext2-sparsity_model",
        "tiny_moe-2-wikitext2-sparsity",
        "a_b-wikitext2-sparsity",
    }


def test_speed_has_a_line_for_each_batch_size(tmp_path):
    for sparsity in (0.2, 0.4):
        run = add(tmp_path, f"a{sparsity}", "camera_p", sparsity, tasks={})
        phase = {"dense": 1.0, "compressed": 2.0, "ratio": 1 + sparsity, "implementation": None}
        batches = {size: {"prefill": phase, "decode": phase} for size in ("1", "16")}
        metrics(run, speed=batches, perplexity={})
    drawn = draw_comparisons(read_runs(OutputFolder(tmp_path).runs()), tmp_path / "figures")
    assert [file.stem for file in drawn] == [
        f"tiny_moe-{phase}_x-sparsity" for phase in ("prefill", "decode")
    ]


def test_the_command_draws_and_says_what(tmp_path, capsys):
    for sparsity in (0.2, 0.4):
        for method in ("camera_p", "someone's"):
            scores = {"tasks": {"boolq": 30.0}, "perplexity": {}}
            run = add(tmp_path, f"{method[0]}{sparsity}", method, sparsity, **scores)
            metrics(run, bytes={"dense": 9_000_000, "compressed": 9_000_000 * (1 - sparsity)})
    add(tmp_path, "dense", "dense", tasks={"boolq": 60.0}, perplexity={})
    add(tmp_path, "bad", "camera_p", 0.6, error="too much.")
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for figure in ("tiny_moe-average-sparsity", "tiny_moe-average-size"):
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
