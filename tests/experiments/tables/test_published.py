"""Published scores beside those of runs of the same setting, and only of those."""

import math

import pytest
from omegaconf import OmegaConf

from camera.evaluation.tasks.names import NINE_TASKS
from experiments.config.location import CONF
from experiments.records.files import OutputFolder
from experiments.tables.aggregate import over_seeds
from experiments.tables.layouts.html import to_html
from experiments.tables.layouts.markdown import to_markdown
from experiments.tables.pages import paper_page
from experiments.tables.published.comparison import MODELS, QUESTIONS, compare, published_scores
from experiments.tables.rows import read_runs
from experiments.tables.writing import write
from experiments.tiny_moe.tasks import TASKS
from tests.helpers.runs.run_folders import add, add_parts

FULL = {"limit": None, "blocks": None}
SETTING = {"sparsity_of": "model", "rank_scope": "layer", "alpha": 0.9, "calibration": {}}
# 61.03 and its neighbours are CAMERA's averages of DeepSeek-MoE-16B.
AVERAGE = 61.03


def camera_p(
    output, name, average=AVERAGE, sparsity=0.2, *, asked=QUESTIONS, length=2048, **changed
):
    """A run of CAMERA's setting with the same score in each of the nine tasks."""
    calibration = {"source": "wikitext2"} | changed.pop("calibration", {})
    settings = SETTING | {"model": "deepseek_moe_16b", "evaluation": FULL} | changed
    settings["calibration"] = calibration
    tasks = dict.fromkeys(NINE_TASKS, average)
    method = settings.pop("method", "camera_p")
    perplexity = {"wikitext2": 6.57, "c4": 9.84}
    folder = add(output, name, method, sparsity, tasks=tasks, perplexity=perplexity, **settings)
    add_parts(folder, dict(asked), length)
    return folder


def compared(output):
    found = compare(over_seeds(read_runs(OutputFolder(output).runs())))
    return {(row["name"], row["score"]): row for row in found.to_dict("records")}


def test_a_run_of_a_published_setting_is_compared(tmp_path):
    camera_p(tmp_path, "a", AVERAGE)
    found = compared(tmp_path)
    row = found["CAMERA", "average"]
    assert (row["folder"], row["published"]) == ("a", AVERAGE)
    assert row["measured"] == pytest.approx(AVERAGE)
    assert "notes on the paper" in row["source"]
    readme = {score for name, score in found if name == "CAMERA code"}
    assert readme == {"wikitext2", "c4", "winogrande", "hellaswag", "boolq", "arc_easy", "mathqa"}


@pytest.mark.parametrize("name", ["deepseek_moe_16b", "deepseek-moe-16b-base"])
def test_a_model_is_known_by_its_name_here_and_by_its_own(tmp_path, name):
    camera_p(tmp_path, "a", model=name)
    assert ("CAMERA", "average") in compared(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "tiny_moe"},
        {"model": "deepseek_v2_lite"},
        {"sparsity": 0.3},
        {"sparsity_of": "moe"},
        {"rank_scope": "global"},
        {"method": "random"},
        {"calibration": {"source": "c4"}},
        {"calibration": {"samples": 64}},
        {"calibration": {"length": 512}},
    ],
    ids=str,
)
def test_another_setting_is_not_compared(tmp_path, changed):
    camera_p(tmp_path, "a", **changed)
    assert compared(tmp_path) == {}


def test_a_part_of_the_measurement_is_not_compared(tmp_path):
    camera_p(tmp_path, "a", asked=QUESTIONS | {"piqa": 100}, length=512)
    scores = {score for _, score in compared(tmp_path)}
    assert "average" not in scores and not scores & {"wikitext2", "c4"}
    assert "boolq" in scores


def test_a_part_of_the_text_is_not_compared(tmp_path):
    camera_p(tmp_path, "a", evaluation={"limit": None, "blocks": 32})
    assert not {score for _, score in compared(tmp_path)} & {"wikitext2", "c4"}


def test_a_run_without_a_result_is_not_compared(tmp_path):
    camera_p(tmp_path, "a", error="out of memory")
    assert compared(tmp_path) == {}


def test_the_error_is_that_of_both_measurements(tmp_path):
    camera_p(tmp_path, "a", AVERAGE)
    run = read_runs(OutputFolder(tmp_path).runs()).iloc[0]
    assert compared(tmp_path)["CAMERA", "average"]["error"] == pytest.approx(
        math.sqrt(2) * run["average_se"]
    )


@pytest.mark.parametrize(("distance", "differs"), [(-1.1, True), (0.9, False), (1.1, True)])
def test_what_lies_outside_the_error_differs(tmp_path, distance, differs):
    # The standard error of an average of nine equal scores p of 101 questions.
    error = math.sqrt(2 * AVERAGE * (100 - AVERAGE) / 100 / 9)
    folder = camera_p(tmp_path, "a", AVERAGE + distance * error)
    row = compared(folder.parent.parent)["CAMERA", "average"]
    # The error is that of the measured score, a little another than that of the published one.
    assert row["error"] == pytest.approx(error, rel=0.05)
    assert row["differs"] is differs


def test_a_perplexity_has_an_error_only_of_several_seeds(tmp_path):
    camera_p(tmp_path, "a", seed=1)
    row = compared(tmp_path)["CAMERA code", "wikitext2"]
    assert math.isnan(row["error"]) and row["differs"] is None
    folder = camera_p(tmp_path, "b", seed=2)
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text.replace('"wikitext2": 6.57', '"wikitext2": 6.97'))
    row = compared(tmp_path)["CAMERA code", "wikitext2"]
    # Two seeds 0.4 apart: s = 0.4 / √2; one published seed and the mean of two.
    assert row["error"] == pytest.approx(0.4 / math.sqrt(2) * math.sqrt(1.5))
    assert row["measured"] == pytest.approx(6.77) and row["differs"] is False


def test_the_page_shows_both_and_flags_what_differs(tmp_path):
    camera_p(tmp_path, "a", AVERAGE - 10)
    page = paper_page(read_runs(OutputFolder(tmp_path).runs()))
    text = to_markdown(page)
    got, expected = (line for line in text.splitlines() if "51.0" in line or "61.0" in line)
    assert "| Camera-P |" in got and "| 51.0 ≠ |" in got
    assert "| CAMERA (published) |" in expected and "≠" not in expected
    assert "- CAMERA: the paper (AAAI 2026)" in text and "- ≠:" in text
    assert '<tr class="published"' in to_html(page)
    assert "- A perplexity of one seed" in text


def test_a_published_row_takes_no_place_in_the_ranking(tmp_path):
    camera_p(tmp_path, "a", AVERAGE - 10)
    camera_p(tmp_path, "b", AVERAGE - 20, method="reap")
    group = paper_page(read_runs(OutputFolder(tmp_path).runs())).tables[0].groups[0]
    published = [row for row in group if not row.folders]
    assert published and all(cell.place == 0 for row in published for cell in row.cells)
    assert [row.cells[-1].place for row in group if row.folders] == [2, 1]


def test_a_file_holds_the_comparison_as_long_as_there_is_one(tmp_path):
    camera_p(tmp_path, "a")
    write(read_runs(OutputFolder(tmp_path).runs()), tmp_path)
    assert "CAMERA,the paper (AAAI 2026)" in (tmp_path / "table_published.csv").read_text().replace(
        '"', ""
    )
    write(read_runs([]), tmp_path)
    assert not (tmp_path / "table_published.csv").exists()


def test_the_published_rows_are_whole_and_of_models_and_methods_that_exist():
    rows = published_scores()
    assert len(rows) == 21 + 4 + 4 + 6
    models = {path.stem for path in (CONF / "model").glob("*.yaml")}
    methods = {path.stem for path in (CONF / "method").glob("*.yaml")}
    known = {"wikitext2", "c4", "average", *NINE_TASKS}
    for row in rows:
        assert row.setting["model"] in models & set(MODELS)
        assert row.setting["method"] in methods
        assert row.scores and set(row.scores) <= known
        assert all(0 < score < 100 for score in row.scores.values())
        assert row.setting["method"] == "dense" or {"sparsity", "bits"} & set(row.setting)
    assert set(QUESTIONS) == set(NINE_TASKS) == set(TASKS)


def test_the_models_names_are_those_of_the_configuration():
    for name, hub in MODELS.items():
        chosen = OmegaConf.load(CONF / "model" / f"{name}.yaml")
        assert (chosen.name, chosen.path.split("/")[-1]) == (name, hub)
