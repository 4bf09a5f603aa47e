"""A run compares its model with the dense one: in its files, in tables, for trackers."""

import json

import pytest

from camera.evaluation.divergence.reference import DenseReference
from camera.runtime.errors import CameraError
from experiments.records.files import OutputFolder
from experiments.runs.run import run
from experiments.runs.summary import check_objective, numbers_of, score_tables, start_of
from experiments.tables.pages import paper_page
from experiments.tables.rows import read_runs
from tests.helpers.runs.composing import choices, settings_of, tiny

TEXTS = ("wikitext2", "c4")


@pytest.fixture
def make(checkpoints, data_folder, tmp_path):
    options = ("evaluation.divergence=8", "evaluation.length=32")
    return lambda *more: settings_of(
        *tiny(checkpoints("qwen2_moe"), data_folder, tmp_path), *options, *more
    )


def metrics_of(settings):
    return json.loads((run(settings) / "metrics.json").read_text())


def test_runs_of_an_output_share_the_dense_predictions(make, tmp_path, monkeypatch):
    made, make_them = [], DenseReference._made
    monkeypatch.setattr(
        DenseReference,
        "_made",
        lambda self, passages, top: (made.append(len(passages)), make_them(self, passages, top))[1],
    )
    dense = metrics_of(make("method=dense"))["divergence"]
    pruned = metrics_of(make("method=random", "sparsity=0.5"))
    assert made == [2]  # both texts in one pass
    for text in TEXTS:
        assert dense[text]["kl"] == pytest.approx(0, abs=1e-6) and dense[text]["agreement"] == 1
        assert pruned["divergence"][text]["kl"] > dense[text]["kl"] + 1e-4
        assert pruned["divergence"][text]["top"] == 8
    streamed = metrics_of(
        make("method=random", "sparsity=0.5", "evaluation.stream=always", f"output={tmp_path}/on")
    )
    for text in TEXTS:
        want = pruned["divergence"][text]
        assert streamed["divergence"][text]["kl"] == pytest.approx(want["kl"], rel=1e-3)

    numbers = numbers_of(pruned)
    assert {f"{name}/{text}" for name in ("kl", "agreement", "acceptance") for text in TEXTS} <= {
        *numbers
    }
    assert numbers["acceptance/c4"] == 100 * pruned["divergence"]["c4"]["acceptance"]
    assert {"kl", "agreement", "acceptance"} <= {*score_tables(pruned)["perplexity"]}

    page = paper_page(read_runs(OutputFolder(tmp_path).runs()))
    scores, damage, costs = page.tables
    headers = [column.header for column in damage.columns]
    assert [header.startswith("KL ") and header.endswith("↓") for header in headers[2:4]] == [
        True
    ] * 2
    assert not any("KL" in column.header for column in (*scores.columns, *costs.columns))
    assert sum("↑" in header for header in headers) == 4
    assert "8 likeliest tokens" in damage.caption
    kl = [row.cells[2].text for group in damage.groups for row in group]
    assert kl[0] == "0.0000" and float(kl[1]) > 0


def test_presets_that_measure_perplexity_measure_damage():
    for name in choices("evaluation"):
        asked = settings_of(f"evaluation={name}").evaluation
        assert (asked["divergence"] is not None) == bool(asked["perplexity"]), name


def test_an_objective_may_be_a_divergence(make):
    check_objective(make("objective=kl/c4"))
    with pytest.raises(CameraError, match="objective=kl/c4 isn't measured"):
        check_objective(make("objective=kl/c4", "evaluation.divergence=null"))


def test_no_tokens_are_none(make):
    with pytest.raises(CameraError, match=r"evaluation\.divergence=0 must be at least 1"):
        run(make("evaluation.divergence=0"))


def test_a_compressed_checkpoint_that_is_measured_is_told_by_what_made_it(make, tmp_path):
    made = run(make("method=magnitude", "sparsity=0.5", "evaluation=none"))
    (checkpoint,) = (tmp_path / "checkpoints").glob("*magnitude*")
    settings = make("method=dense", f"model.path={checkpoint}", f"output={tmp_path}/again")
    assert settings.divergence is None and settings.measures().divergence is None
    measured = run(settings)
    found = json.loads((measured / "metrics.json").read_text())
    assert found["divergence"] == {}  # it would be compared with itself
    before = json.loads((made / "metrics.json").read_text())
    assert {key: found[key] for key in ("sparsity", "bytes")} == {
        key: before[key] for key in ("sparsity", "bytes")
    }

    scores, costs = paper_page(read_runs([measured])).tables
    for table in (scores, costs):
        ((row,),) = table.groups
        assert [cell.text for cell in row.cells[:2]] == ["50%", "Magnitude"]
    start = start_of(json.loads((measured / "settings.json").read_text()))
    assert start["name"] == "magnitude-50" and start["job_type"] == "magnitude"
