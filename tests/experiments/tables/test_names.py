"""An embedded or own data set never stands under a public one's name, in no form of a table."""

import csv
import io
import re
from pathlib import Path

import pytest

from camera.calibration.corpora import CORPORA
from camera.evaluation.tasks.names import NINE_TASKS
from experiments.records.files import OutputFolder
from experiments.tables.names.datasets import data_name, dataset_key, dataset_label
from experiments.tables.rows import read_runs
from experiments.tables.writing import show, write
from tests.helpers.runs.run_folders import add

NAMES = (*CORPORA, "mixed", *NINE_TASKS)
PUBLIC = {
    dataset_label(name, "hub", short=short).lower() for name in NAMES for short in (False, True)
} | {*NAMES}
SCORES = dict.fromkeys(NINE_TASKS, 50.0)


@pytest.mark.parametrize("data", ["embedded", "/somewhere/else/my_texts", "my_texts"])
@pytest.mark.parametrize("name", NAMES)
def test_no_label_of_other_data_is_a_public_name(name, data):
    labels = {dataset_label(name, data, short=short) for short in (False, True)}
    assert not {label.lower() for label in (*labels, dataset_key(name, data))} & PUBLIC


def test_public_data_have_their_public_names():
    assert dataset_label("wikitext2", "hub") == "WikiText-2"
    assert dataset_label("wikitext2", "hub", short=True) == "Wiki2"
    assert dataset_label("mixed", "hub") == "WikiText-2 + C4"
    assert dataset_label("boolq", "hub") == "BoolQ" and dataset_key("boolq", "hub") == "boolq"


def test_other_data_say_where_they_come_from():
    assert dataset_label("wikitext2", "embedded") == "tiny encyclopaedia"
    assert dataset_label("boolq", "embedded") == "tiny-BoolQ"
    assert dataset_label("c4", "/data/news") == "news/c4"
    assert dataset_label("/data/letters.txt", "hub") == "letters.txt"
    assert data_name("embedded") == "embedded" and data_name("hub") == "hub"


def test_a_folder_that_no_mirror_wrote_has_its_own_name(data_folder):
    assert data_name(str(data_folder)) == Path(data_folder).name


@pytest.mark.parametrize("data", ["embedded", "/data/news"])
def test_every_form_of_a_table_names_the_data(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    own = {"data": data, "tasks": SCORES}
    add(tmp_path, "dense", "dense", **own)
    for source in ("wikitext2", "c4"):
        calibration = {"source": source}
        add(tmp_path, f"on-{source}", "camera_p", 0.4, calibration=calibration, **own)
    runs = read_runs(OutputFolder(tmp_path).runs())
    write(runs, tmp_path)
    show(runs)
    header = "".join(capsys.readouterr().out.splitlines()[1:3])  # in two lines
    assert len(re.findall(r"tiny-|news/", header)) == len([*CORPORA, *NINE_TASKS])
    for kind in ("md", "tex"):
        text = (tmp_path / f"table.{kind}").read_text()
        said = re.sub(r"(tiny[- ]|news/)\s*[\w-]+", "", text.replace("\\_", "_"))
        for name in ("Wiki2", "WikiText", "wikitext2", "C4", "c4", *NINE_TASKS, "BoolQ", "MathQA"):
            assert not re.search(rf"\b{name}\b", said), name
    cells = re.split(r"[,=\n]", (tmp_path / "table.csv").read_text())
    assert not {*cells} & {*CORPORA, *NINE_TASKS}
    header = next(csv.reader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert dataset_key("boolq", data) in header and f"{dataset_key('boolq', data)}_se" in header


def test_scores_on_other_data_are_columns_of_their_own(tmp_path):
    add(tmp_path, "tiny", "naee", 0.4, data="embedded", perplexity={"c4": 2.0}, tasks={})
    add(tmp_path, "real", "naee", 0.4, perplexity={"c4": 9.0}, tasks={}, model="m")
    write(read_runs(OutputFolder(tmp_path).runs()), tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    found = {row["folder"]: (row["tiny_web"], row["c4"]) for row in rows}
    assert found == {"tiny": ("2.0", ""), "real": ("", "9.0")}
