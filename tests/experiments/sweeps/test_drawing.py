"""The end of a sweep names its figures, and none of them stops it."""

import logging

import numpy as np
from matplotlib import image

from experiments.records.files import OutputFolder, SweepFiles
from experiments.sweeps.drawing import draw_sweep
from experiments.tables.rows import read_runs
from tests.helpers.runs.run_folders import add


def sweep_of(output):
    """A sweep's files, and the rows of two runs of which one has a figure."""
    for method in ("camera_p", "naee"):
        add(output, method, method, 0.2, tasks={"boolq": 50.0}, perplexity={"c4": 9.0})
    image.imsave(output / "runs" / "naee" / "energies.png", np.zeros((2, 2, 3)))
    return SweepFiles(output / "sweeps" / "1"), read_runs(OutputFolder(output).runs())


def test_a_sweep_says_where_which_figures_are(tmp_path):
    sweep, runs = sweep_of(tmp_path)
    own, over = draw_sweep(sweep, runs).lines
    assert own == f"figures of one run, in {tmp_path / 'runs'}: energies"
    folder = sweep.folder / "figures"
    drawn = sorted(file.stem for file in folder.glob("*.png"))
    head, _, names = over.rpartition(": ")
    assert head == f"figures over the runs, in {folder}"
    assert sorted(names.split(", ")) == drawn and "tiny_moe-main-average-sparsity" in drawn


def test_figures_that_cannot_be_drawn_are_one_sentence(tmp_path, monkeypatch, caplog):
    def broken(*arguments):
        raise OSError("no such font")

    monkeypatch.setattr("experiments.figures.comparison.draw_comparisons", broken)
    with caplog.at_level(logging.WARNING):
        assert len(draw_sweep(*sweep_of(tmp_path)).lines) == 1
    said = [record.getMessage() for record in caplog.records]
    assert said == ["The figures over the runs can't be drawn: OSError: no such font"]


def test_runs_without_figures_are_not_named(tmp_path):
    add(tmp_path, "a", "naee", 0.2)
    runs = read_runs(OutputFolder(tmp_path).runs())
    assert draw_sweep(SweepFiles(tmp_path / "sweeps" / "1"), runs).lines == []
