"""Seeds as one row: what is merged, and what the numbers of the merged row are."""

import statistics

import pandas as pd
import pytest

from experiments.records.files import OutputFolder
from experiments.tables.aggregate import over_seeds
from experiments.tables.rows import read_runs
from tests.helpers.runs.run_folders import add

SCORES = {1: 40.0, 2: 43.0, 3: 50.0}


@pytest.fixture
def output(tmp_path):
    for seed, score in SCORES.items():
        perplexity = {"wikitext2": score / 2, "c4": 9.0}
        scores = {"boolq": score, "piqa": 80.0}
        add(
            tmp_path,
            f"s{seed}",
            "camera_p",
            0.4,
            seed=seed,
            tasks=scores,
            perplexity=perplexity,
            alpha=0.9,
        )
    add(tmp_path, "dense", "dense")
    return tmp_path


def means_of(output):
    return over_seeds(read_runs(OutputFolder(output).runs())).set_index("folder")


def test_scores_are_mean_and_standard_deviation_of_a_sample(output):
    row = means_of(output).loc["s1"]
    for score, values in {
        "boolq": list(SCORES.values()),
        "wikitext2": [value / 2 for value in SCORES.values()],
        "average": [(value + 80) / 2 for value in SCORES.values()],
        "c4": [9.0] * 3,
    }.items():
        assert row[score] == pytest.approx(statistics.mean(values))
        assert row[f"{score}_std"] == pytest.approx(statistics.stdev(values))
    assert (row["n"], row["seeds"], row["folders"]) == (3, [1, 2, 3], ["s1", "s2", "s3"])


def test_a_run_without_another_seed_stays_as_it_is(output):
    runs = read_runs(OutputFolder(output).runs()).set_index("folder")
    means = means_of(output)
    assert means.loc["dense", "n"] == 1
    assert pd.isna(means.loc["dense", "boolq_std"])
    same = runs.columns.drop(["_identity", "settings"])
    pd.testing.assert_series_equal(means.loc["dense", same], runs.loc["dense", same])


def test_the_seed_of_the_method_itself_is_a_seed_too(tmp_path):
    for seed in (1, 2):
        add(tmp_path, f"r{seed}", "random", 0.2, seed=seed, seeded=True)
    means = means_of(tmp_path)
    assert list(means["n"]) == [2]
    assert list(means["settings"]) == [""]


def test_what_differs_in_more_than_the_seed_is_not_merged(output):
    add(output, "alpha", "camera_p", 0.4, seed=4, alpha=0.5)
    add(output, "ratio", "camera_p", 0.2, seed=4, alpha=0.9)
    add(output, "of", "camera_p", 0.4, seed=4, alpha=0.9, sparsity_of="model")
    add(output, "paper", "camera_p", 0.4, seed=4, alpha=0.9, evaluation={"limit": None})
    add(output, "text", "camera_p", 0.4, seed=4, alpha=0.9, calibration={"source": "c4"})
    add(output, "method", "heapr", 0.4, seed=4, alpha=0.9)
    add(output, "model", "camera_p", 0.4, seed=4, alpha=0.9, model="other")
    n = means_of(output)["n"]
    assert n["s1"] == 3
    assert set(n.drop("s1")) == {1}
    assert n.sum() == 3 + 8


def test_settings_tell_apart_without_the_seed(output):
    add(output, "half", "camera_p", 0.4, seed=9, alpha=0.5)
    runs = read_runs(OutputFolder(output).runs()).set_index("folder")
    assert "seed=9" in runs.loc["half", "settings"]
    means = means_of(output)
    assert means.loc["half", "settings"] == "alpha=0.5"
    assert means.loc["s1", "settings"] == "alpha=0.9"


def test_failed_and_unfinished_runs_stay_rows_of_their_own(output):
    add(output, "s4", "camera_p", 0.4, seed=4, alpha=0.9, error="out of memory")
    add(output, "s5", "camera_p", 0.4, seed=5, alpha=0.9, error="out of memory")
    add(output, "s6", "camera_p", 0.4, seed=6, alpha=0.9, done=False)
    means = means_of(output)
    assert means.loc["s1", "n"] == 3
    assert list(means.loc[["s4", "s5", "s6"], "n"]) == [0, 0, 0]
    assert means.loc["s5", "status"] == "failed: out of memory"


def test_standard_errors_do_not_shrink_with_seeds(output):
    runs = read_runs(OutputFolder(output).runs()).set_index("folder")
    own = runs.loc[["s1", "s2", "s3"], "average_se"]
    assert means_of(output).loc["s1", "average_se"] == pytest.approx(own.mean())


def test_the_order_of_the_runs_is_kept(output):
    add(output, "early", "camera_p", 0.2, alpha=0.9)
    assert list(means_of(output).index) == ["dense", "early", "s1"]


def test_no_runs_are_no_rows():
    assert over_seeds(read_runs([])).empty
