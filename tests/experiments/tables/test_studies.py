"""One table per study: as presets asked, else by what was varied; costs with their statistics."""

import pandas as pd
import pytest

from experiments.config.location import CONF
from experiments.records.files import OutputFolder, RunFiles
from experiments.tables.aggregate import over_seeds
from experiments.tables.comparable import comparable_runs
from experiments.tables.names.methods import METHODS, display_name, method_order
from experiments.tables.names.studies import study_of_grid, study_title
from experiments.tables.pages import paper_page
from experiments.tables.rows import read_runs
from experiments.tables.studies import asked_here
from tests.helpers.runs.run_folders import add


def studies(output):
    """study: the folders of its rows."""
    found = {}
    for block in comparable_runs(over_seeds(read_runs(OutputFolder(output).runs()))):
        found.setdefault(block.study, []).append(sorted(block.runs["folder"]))
    return found


def test_a_preset_is_a_table_and_a_run_of_two_presets_stands_in_both(tmp_path):
    add(tmp_path, "dense", "dense", studies=["pruning", "alpha"])
    add(tmp_path, "naee", "naee", 0.4, studies=["pruning"])
    add(tmp_path, "p9", "camera_p", 0.4, alpha=0.9, studies=["pruning", "alpha"])
    add(tmp_path, "p0", "camera_p", 0.4, alpha=0, studies=["alpha"])
    add(tmp_path, "q", "camera_q", bits=2.5, studies=["quantization"])
    assert studies(tmp_path) == {
        "main": [["dense", "naee", "p9"]],
        "quantization": [["dense", "q"]],
        "alpha": [["dense", "p0", "p9"]],
    }


def test_runs_by_hand_are_grouped_by_the_setting_that_was_varied(tmp_path):
    add(tmp_path, "dense", "dense")
    for alpha in (0.0, 0.5, 0.9, 1.0):
        add(tmp_path, f"a{alpha}", "camera_p", 0.4, alpha=alpha)
    add(tmp_path, "low", "camera_p", 0.2, alpha=0.9)
    add(tmp_path, "naee", "naee", 0.4)
    add(tmp_path, "lam1", "my_method", 0.4, lam=1)
    add(tmp_path, "lam2", "my_method", 0.4, lam=2)
    add(tmp_path, "lam1b", "my_method", 0.2, lam=1)
    assert studies(tmp_path) == {
        "main": [["a0.9", "dense", "lam1", "lam1b", "low", "naee"]],
        "alpha": [["a0.0", "a0.5", "a0.9", "a1.0", "dense"]],
        "lam": [["dense", "lam1", "lam2"]],
    }


def test_of_as_many_runs_each_the_default_is_the_usual_one(tmp_path):
    for alpha in (0.0, 0.9):
        add(tmp_path, f"a{alpha}", "camera_p", 0.4, alpha=alpha)
    add(tmp_path, "naee", "naee", 0.4)
    assert studies(tmp_path) == {"main": [["a0.9", "naee"]], "alpha": [["a0.0", "a0.9"]]}


def test_one_method_with_a_setting_varied_is_one_study(tmp_path):
    for alpha in (0.0, 0.9):
        add(tmp_path, f"a{alpha}", "camera_p", 0.4, alpha=alpha)
    assert studies(tmp_path) == {"alpha": [["a0.0", "a0.9"]]}


def test_a_sweep_shows_its_own_studies_only(tmp_path):
    add(tmp_path, "p9", "camera_p", 0.4, alpha=0.9, studies=["pruning", "alpha"])
    add(tmp_path, "p0", "camera_p", 0.4, alpha=0.0, studies=["alpha"])
    add(tmp_path, "dense", "dense", studies=["pruning"])
    runs = read_runs(OutputFolder(tmp_path).runs())
    for grids in ({"alpha"}, set()):
        shown = [table.study for table in paper_page(asked_here(runs, grids)).tables]
        assert set(shown) == {"alpha"}
    assert asked_here(read_runs([]), set()).empty


def test_two_settings_varied_at_once_are_a_study_of_both(tmp_path):
    sizes = [{"samples": 64, "source": source} for source in ("c4", "wikitext2")]
    add(tmp_path, "usual", "camera_p", 0.4, calibration={"source": "wikitext2"})
    for number, calibration in enumerate(sizes):
        add(tmp_path, f"n{number}", "camera_p", 0.4, calibration=calibration)
    add(tmp_path, "again", "camera_p", 0.2, calibration={"source": "wikitext2"})
    add(tmp_path, "third", "camera_p", 0.6, calibration={"source": "wikitext2"})
    assert studies(tmp_path) == {
        "main": [["again", "third", "usual"]],
        "calibration_size": [["n1", "usual"]],
        "calibration_size+calibration_source": [["n0", "usual"]],
    }
    assert study_title("calibration_size+calibration_source") == (
        "Ablation: calibration size and calibration text"
    )


def test_an_ablation_tells_every_setting_in_the_order_of_its_numbers(tmp_path):
    for alpha in (1.0, 0, 0.25, 0.9):
        add(tmp_path, f"a{alpha}", "camera_p", 0.4, alpha=alpha, studies=["alpha"])
    (block,) = comparable_runs(over_seeds(read_runs(OutputFolder(tmp_path).runs())))
    assert list(block.runs["settings"]) == ["alpha=0", "alpha=0.25", "alpha=0.9", "alpha=1"]


def test_a_study_of_which_nothing_was_measured_is_a_table_of_costs(tmp_path):
    nothing = {"perplexity": [], "tasks": []}
    add(tmp_path, "e", "camera_p", 0.2, tasks={}, evaluation=nothing, studies=["energy"])
    metrics = RunFiles(tmp_path / "runs" / "e").metrics
    metrics.write_text(metrics.read_text().replace('"wikitext2": 12.345, "c4": 23.456', ""))
    (table,) = paper_page(read_runs(OutputFolder(tmp_path).runs())).tables
    assert table.title == "Energies of micro-experts: tiny_moe, sparsity of the experts: cost"


def test_every_method_and_preset_of_the_configuration_has_a_name():
    methods = {file.stem for file in (CONF / "method").glob("*.yaml")}
    assert methods == {method.name for method in METHODS}
    presets = {file.stem for file in (CONF / "experiment").glob("*.yaml")} - {"all", "paper"}
    assert all(study_title(study_of_grid(preset)) != preset for preset in presets)


def test_methods_stand_in_the_order_of_papers_and_a_users_own_come_last():
    names = ["mine", "camera_p", "naee", "dense", "d2_moe", "random", "another"]
    ordered = [display_name(name) for name in sorted(names, key=method_order)]
    assert ordered == ["Dense", "Random", "NAEE", "D²-MoE", "Camera-P", "another", "mine"]


def test_studies_are_entered_once(tmp_path):
    files = RunFiles(tmp_path)
    assert files.studies == []
    files.enter_studies(["alpha"])
    files.enter_studies(["alpha", "scope"])
    assert files.studies == ["alpha", "scope"]


@pytest.fixture
def costs(tmp_path):
    add(tmp_path, "dense", "dense", seconds={"calibrate": 0, "compress": 0, "evaluate": 120})
    used = {"seconds": 600, "peak_memory_bytes": 9_000_000_000}
    add(tmp_path, "first", "heapr", 0.2, seconds={"calibrate": 600, "compress": 60})
    add(tmp_path, "second", "heapr", 0.4, seconds={"calibrate": 0, "compress": 60}, cached=used)
    return tmp_path


def test_minutes_are_of_the_compression_with_its_statistics_whoever_gathered_them(costs):
    rows = read_runs(OutputFolder(costs).runs()).set_index("folder")
    assert rows.loc["first", "minutes"] == rows.loc["second", "minutes"] == 11
    assert rows.loc["second", "peak_gb"] == 9 and rows.loc["first", "peak_gb"] == 0.5
    assert pd.isna(rows.loc["dense", "minutes"])
    assert rows.loc["dense", "evaluation_minutes"] == 2


def test_cached_stands_beside_what_includes_statistics_of_others(costs):
    page = paper_page(read_runs(OutputFolder(costs).runs()))
    cost = page.tables[1]
    headers = [column.header for column in cost.columns]
    first, second = (group[0].cells for group in cost.groups)
    for name in ("Minutes", "Peak GB"):
        at = headers.index(name)
        assert (first[at].behind, second[at].behind) == ("", " cached")
    assert any(note.startswith("cached: ") for note in page.notes)
