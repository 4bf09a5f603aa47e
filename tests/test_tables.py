"""Tables: rows, order, what a failed run shows, and how they are written."""

import json
from pathlib import Path

import pandas as pd
import pytest

from experiments.layouts import paper_layout, print_table, to_latex, to_markdown
from experiments.tables import find_runs, main, read_runs, with_dense_rows, write

TASK = {"acc": 0.25, "acc_stderr": 0.1, "acc_norm": None, "acc_norm_stderr": None}


def add(
    output: Path,
    name: str,
    method: str,
    sparsity: float | None = None,
    *,
    model: str = "tiny_moe",
    error: str | None = None,
    done: bool = True,
    evaluation: str = "quick",
    **settings: float,
) -> Path:
    """A run folder as a run writes it."""
    folder = output / "runs" / name
    folder.mkdir(parents=True)
    chosen = {"_target_": method, **settings}
    if sparsity is not None:
        chosen |= {"sparsity": sparsity, "sparsity_of": "moe"}
    identity = {"model": model, "method": chosen, "evaluation": {"kind": evaluation}, "seed": 1}
    asked = {"model": {"name": model}, "method": chosen}
    stored = {"method": method, "settings": asked, "identity": identity}
    (folder / "settings.json").write_text(json.dumps(stored))
    if error:
        (folder / "error.txt").write_text(f"{error}\n\nTraceback\n")
    if error or not done:
        return folder
    metrics = {
        "sparsity": {"moe": sparsity or 0, "model": 0.15, "routed": 0.25},
        "perplexity": {"wikitext2": 12.345, "c4": 23.456},
        "tasks": {"boolq": TASK, "arc_easy": {**TASK, "acc_norm": 0.5}},
        "average": 37.5,
        "bytes": {"dense": 2_000_000, "compressed": 1_500_000},
        "seconds": {"calibrate": 60, "compress": 30, "evaluate": 30},
        "peak_memory_bytes": 500_000_000 if sparsity else 0,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "DONE").touch()
    return folder


@pytest.fixture
def output(tmp_path):
    add(tmp_path, "c", "camera_p", 0.4, alpha=0.9)
    add(tmp_path, "a", "random", 0.4)
    add(tmp_path, "b", "dense")
    add(tmp_path, "d", "camera_p", 0.2, alpha=0.9)
    return tmp_path


def test_rows_are_in_the_order_of_the_paper(output):
    runs = read_runs(find_runs(output))
    assert list(runs["folder"]) == ["b", "d", "c", "a"]


def test_a_row_is_in_percent_megabytes_minutes(output):
    row = read_runs(find_runs(output)).set_index("folder").loc["c"]
    assert (row["sparsity"], row["sparsity_of"]) == (40, "moe")
    assert (row["sparsity_moe"], row["sparsity_model"], row["sparsity_routed"]) == (40, 15, 25)
    assert (row["boolq"], row["arc_easy"], row["average"]) == (25, 50, 37.5)
    assert (row["size_mb"], row["minutes"], row["peak_gb"]) == (1.5, 2, 0.5)


def test_failed_and_unfinished_runs_are_rows_with_their_reason(output):
    add(output, "e", "camera_p", 0.6, error="sparsity=0.6 is | too much.")
    add(output, "f", "camera_p", 0.7, done=False)
    page = to_markdown(paper_layout(read_runs(find_runs(output))))
    assert "failed: sparsity=0.6 is \\| too much." in page
    assert "unfinished" in page
    assert len({line.replace("\\|", "").count("|") for line in page.splitlines()}) == 1


def test_only_settings_that_differ_are_told(output):
    assert set(read_runs(find_runs(output))["settings"]) == {""}
    add(output, "e", "camera_p", 0.4, alpha=0.5)
    runs = read_runs(find_runs(output)).set_index("folder")
    assert runs.loc["e", "settings"] == "alpha=0.5"
    assert runs.loc["c", "settings"] == "alpha=0.9"
    assert runs.loc["b", "settings"] == ""


def test_a_sweep_shows_its_runs_and_the_dense_ones_that_compare(output):
    add(output, "e", "dense", evaluation="paper")
    add(output, "f", "dense", model="other")
    runs = with_dense_rows(read_runs(find_runs(output)), ["c"])
    assert list(runs["folder"]) == ["b", "c"]


def test_latex_is_escaped_and_has_rules(output):
    add(output, "e", "camera_p", 0.6, error="50% & more_of {this} $\\x$ #1 ~ ^")
    page = to_latex(paper_layout(read_runs(find_runs(output))))
    for part in (r"\toprule", r"\bottomrule", r"camera\_p", r"40\%"):
        assert part in page
    assert r"50\% \& more\_of \{this\} \$\textbackslash{}x\$ \#1" in page


def test_the_csv_holds_the_numbers(output):
    write(read_runs(find_runs(output)), output)
    read = pd.read_csv(output / "table.csv").set_index("folder")
    assert read.loc["c", "wikitext2"] == 12.345
    assert "_identity" not in read


def test_the_command_remakes_the_table(output, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([str(output)]) == 0
    printed = capsys.readouterr().out
    for cell in ("camera_p", "12.35", "37.5", "ARC-e", "Peak GB"):
        assert cell in printed
    first = {kind: (output / f"table.{kind}").read_text() for kind in ("md", "csv", "tex")}
    assert main([str(output)]) == 0
    assert first == {kind: (output / f"table.{kind}").read_text() for kind in first}


def test_the_command_refuses_a_folder_without_runs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "has no runs" in capsys.readouterr().err
    assert main([]) == 1


def test_a_narrow_terminal_cuts_no_cell(output, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    print_table(paper_layout(read_runs(find_runs(output))))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "camera_p" in printed and "23.46" in printed and "Minutes" in printed


def test_a_single_run_folder_is_found_wherever_it_is(output):
    assert find_runs(output / "runs" / "c") == [output / "runs" / "c"]
