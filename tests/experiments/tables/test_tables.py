"""Runs as rows, and the command that makes their tables."""

import json
import math

import pandas as pd
import pytest

from experiments.records.files import OutputFolder
from experiments.tables.rows import (
    perplexity_columns,
    read_runs,
    score_columns,
    with_dense_rows,
)
from experiments.tables.writing import main, write
from tests.helpers.runs.run_folders import add


@pytest.fixture
def output(tmp_path):
    add(tmp_path, "c", "camera_p", 0.4, alpha=0.9, rank_scope="layer", calibration={"length": 512})
    add(tmp_path, "a", "random", 0.4)
    add(tmp_path, "b", "dense")
    add(tmp_path, "d", "camera_p", 0.2, alpha=0.9, rank_scope="layer")
    return tmp_path


def rows_of(output):
    return read_runs(OutputFolder(output).runs()).set_index("folder")


def test_rows_are_in_the_order_of_the_paper(output):
    assert list(rows_of(output).index) == ["b", "d", "a", "c"]


def test_a_row_is_in_percent_megabytes_minutes(output):
    row = rows_of(output).loc["c"]
    assert (row["sparsity"], row["sparsity_of"]) == (40, "moe")
    assert (row["sparsity_moe"], row["sparsity_model"], row["sparsity_routed"]) == (40, 15, 25)
    assert (row["boolq"], row["arc_easy"], row["average"]) == (25, 50, 37.5)
    assert (row["size_mb"], row["minutes"], row["peak_gb"]) == (1.5, 1.5, 0.5)
    assert row["evaluation_minutes"] == 0.5


def test_a_row_says_how_it_was_made(output):
    rows = rows_of(output)
    row = rows.loc["c"]
    assert (row["seed"], row["alpha"], row["rank_scope"]) == (1234, 0.9, "layer")
    assert (row["calibration"], row["samples"], row["length"]) == ("wikitext2", 128, 512)
    for column in ("alpha", "rank_scope", "calibration", "samples", "length"):
        assert pd.isna(rows.loc["b", column])


def test_the_length_of_a_sample_is_the_one_used(output):
    report = output / "runs" / "c" / "compress.json"
    report.write_text(json.dumps({"calibration": {"samples": 64, "length": 256}}))
    row = rows_of(output).loc["c"]
    assert (row["samples"], row["length"]) == (64, 256)


def test_standard_errors_are_of_the_headline_scores(output):
    row = rows_of(output).loc["c"]
    assert row["boolq_se"] == pytest.approx(100 * math.sqrt(0.25 * 0.75 / 100))
    assert row["arc_easy_se"] == pytest.approx(100 * math.sqrt(0.5 * 0.5 / 100))
    # The mean of two independent scores.
    variance = (row["boolq_se"] ** 2 + row["arc_easy_se"] ** 2) / 4
    assert row["average_se"] == pytest.approx(math.sqrt(variance))


def test_a_task_without_acc_norm_has_the_error_of_acc_and_one_row_has_none(output):
    file = output / "runs" / "c" / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["tasks"]["boolq"] |= {"acc_norm": None, "acc_norm_stderr": None}
    file.write_text(json.dumps(metrics))
    assert rows_of(output).loc["c", "boolq_se"] == 90
    metrics["tasks"]["boolq"]["acc_stderr"] = None
    file.write_text(json.dumps(metrics))
    row = rows_of(output).loc["c"]
    assert pd.isna(row["boolq_se"]) and pd.isna(row["average_se"])
    assert row["arc_easy_se"] == 5


def test_runs_without_tasks_have_no_average(tmp_path):
    add(tmp_path, "a", "camera_p", 0.2, tasks={})
    row = rows_of(tmp_path).loc["a"]
    assert pd.isna(row["average"]) and pd.isna(row["average_se"])


def test_scores_are_told_from_costs_and_settings(output):
    runs = read_runs(OutputFolder(output).runs())
    assert score_columns(runs) == ["wikitext2", "c4", "boolq", "arc_easy", "average"]
    assert perplexity_columns(runs) == ["wikitext2", "c4"]


def test_only_settings_that_differ_are_told(output):
    assert set(rows_of(output)["settings"]) == {""}
    add(output, "e", "camera_p", 0.4, alpha=0.5, rank_scope="layer")
    runs = rows_of(output)
    assert runs.loc["e", "settings"] == "alpha=0.5"
    assert runs.loc["c", "settings"] == ""  # as most of its method
    assert runs.loc["b", "settings"] == ""


def test_a_sweep_shows_its_runs_and_the_dense_ones_that_compare(output):
    add(output, "e", "dense", evaluation={"limit": None})
    add(output, "f", "dense", model="other")
    add(output, "g", "dense", seed=7)
    runs = with_dense_rows(read_runs(OutputFolder(output).runs()), ["c"])
    assert list(runs["folder"]) == ["b", "g", "c"]


def test_a_single_run_folder_is_found_wherever_it_is(output):
    assert OutputFolder(output / "runs" / "c").runs() == [output / "runs" / "c"]


def test_the_csv_holds_the_numbers_of_every_run(output):
    add(output, "e", "camera_p", 0.2, alpha=0.9, rank_scope="layer", seed=7)
    write(read_runs(OutputFolder(output).runs()), output)
    read = pd.read_csv(output / "table.csv").set_index("folder")
    assert set(read.index) == set("abcde")
    assert read.loc["c", "wikitext2"] == 12.345
    assert {"seed", "alpha", "samples", "boolq_se", "average_se"} <= set(read)
    assert not [column for column in read if column.startswith("_")]


def test_the_other_csv_holds_means_over_seeds(output):
    add(output, "e", "camera_p", 0.2, alpha=0.9, rank_scope="layer", seed=7, tasks={"boolq": 30.0})
    write(read_runs(OutputFolder(output).runs()), output)
    read = pd.read_csv(output / "table_seeds.csv").set_index("folder")
    assert (read.loc["e", "boolq"], read.loc["e", "n"]) == (27.5, 2)
    assert (read.loc["e", "seeds"], read.loc["e", "folders"]) == ("7 1234", "e d")


def test_the_command_remakes_the_tables(output, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([str(output)]) == 0
    printed = capsys.readouterr().out
    for cell in ("Camera-P", "12.35", "37.5", "ARC-e", "Peak GB"):
        assert cell in printed
    files = {f"table.{kind}" for kind in ("md", "csv", "tex")}
    assert {path.name for path in output.iterdir()} == {*files, "runs"}
    first = {file: (output / file).read_text() for file in files}
    assert main([str(output)]) == 0
    assert first == {file: (output / file).read_text() for file in files}


def test_the_commands_options_reach_the_page(output, capsys):
    assert main([str(output), "--errors", "se", "--delta"]) == 0
    page = (output / "table.md").read_text()
    assert "37.5 ± 3.3" in page.replace("**", "") and "| Δ |" in page
    assert main(["--against", "camera_p", str(output)]) == 0
    assert "| +0.0 |" in (output / "table.md").read_text()
    assert main(["--against", "no_method", str(output)]) == 1
    assert "No run has method=no_method: compare with one of camera_p" in capsys.readouterr().err
    assert main([str(output)]) == 0
    assert "±" not in (output / "table.md").read_text()


def test_the_command_refuses_a_folder_without_runs(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path)]) == 1
    assert "has no runs" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    assert "outputs" in capsys.readouterr().err
