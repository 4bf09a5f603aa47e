"""What a run's result depends on is in its folder's name, or at least in its row."""

import gzip
import json
import shutil
from dataclasses import replace

import pytest

from experiments.records import identity
from experiments.records.folders import Folders
from experiments.records.identity import measurement_key
from experiments.runs import measurements
from experiments.runs.run import run
from experiments.tables.rows import read_runs
from tests.helpers.runs.composing import settings_of, tiny


@pytest.fixture
def model(checkpoints, tmp_path):
    return shutil.copytree(checkpoints("qwen2_moe"), tmp_path / "model")


@pytest.fixture
def data(data_folder, tmp_path):
    folder = shutil.copytree(data_folder, tmp_path / "data")
    (folder / "tasks").mkdir()
    with gzip.open(folder / "tasks" / "piqa.jsonl.gz", "wt") as file:
        file.write("{}")
    return folder


@pytest.fixture
def make(model, data, tmp_path):
    return lambda *more: settings_of(*tiny(model, data, tmp_path / "o"), "model.name=m", *more)


def names(settings):
    folders = Folders.of(settings)
    return folders.run.name, folders.checkpoint.name


def test_content_of_texts_names_what_reads_them(make, data):
    quick = ("evaluation.perplexity=[wikitext2]", "evaluation.tasks=[piqa]")
    run_name, checkpoint = names(make(*quick))
    unread = data / "c4" / "validation.jsonl.gz"
    unread.write_bytes(b"")
    assert names(make(*quick)) == (run_name, checkpoint)
    for evaluated in ("wikitext2/test.txt", "tasks/piqa.jsonl.gz"):
        (data / evaluated).write_bytes((data / evaluated).read_bytes() + b" ")
        changed, same = names(make(*quick))
        assert changed != run_name and same == checkpoint
        run_name = changed
    train = data / "wikitext2" / "train.txt"
    train.write_text(train.read_text()[::-1])
    assert names(make(*quick))[1] != checkpoint


def test_a_moved_data_folder_is_the_same_texts(make, data, tmp_path):
    before = names(make())
    data.rename(tmp_path / "moved")
    assert names(make(f"data={tmp_path / 'moved'}")) == before


def test_content_of_a_calibration_file_names_the_checkpoint(make, tmp_path):
    text = tmp_path / "my.txt"
    text.write_text("some words " * 999)
    for place in ("hub", "embedded"):
        asked = (f"calibration.source={text}", f"data={place}")
        before = names(make(*asked))
        text.write_text(text.read_text() + "more")
        assert all(old != new for old, new in zip(before, names(make(*asked)), strict=True))


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "modeling_x.py"])
def test_tokenizer_and_code_of_the_model_name_the_folders(file, make, model):
    before = names(make())
    with (model / file).open("a") as opened:
        opened.write(" ")
    assert all(old != new for old, new in zip(before, names(make()), strict=True))


@pytest.mark.parametrize("version", ["MATHEMATICS", "version"])
def test_another_mathematics_or_torch_is_another_run_that_is_not_compared(
    version, make, monkeypatch
):
    before = Folders.of(make())
    monkeypatch.setattr(identity, version, 99 if version == "MATHEMATICS" else lambda _: "99")
    after = Folders.of(make())
    assert before.run != after.run and before.checkpoint != after.checkpoint
    assert measurement_key(before.identity) != measurement_key(after.identity)


def test_a_hub_model_is_named_by_its_commit(make, monkeypatch, tmp_path):
    commit = tmp_path / "snapshots" / "0123abc"
    monkeypatch.setattr(identity, "resolve_model", lambda *_, **__: commit)
    identity._hub_contents.cache_clear()
    assert Folders.of(make("model.path=own/moe@main")).identity["model"] == "own/moe@0123abc"
    identity._hub_contents.cache_clear()


def test_runs_on_other_devices_are_not_compared(make, no_accelerator, monkeypatch):
    settings = make("evaluation=none")
    folder = run(settings)
    (row,) = read_runs([folder])["_identity"]
    assert row["computed"] == {"device": "cpu", "dtype": "float32"}
    stored = json.loads((folder / "settings.json").read_text())
    stored["identity"]["computed"] = {"device": "cuda", "dtype": "the stored dtype"}
    (folder / "settings.json").write_text(json.dumps(stored))
    (other,) = read_runs([folder])["_identity"]
    assert measurement_key(row) != measurement_key(other)


def test_parts_of_another_device_are_measured_anew(make, no_accelerator, monkeypatch, caplog):
    settings = make("method=dense")
    folder = run(settings)
    (folder / "DONE").unlink()
    stored = json.loads((folder / "settings.json").read_text())
    stored["identity"]["computed"] = {"device": "cuda", "dtype": "the stored dtype"}
    (folder / "settings.json").write_text(json.dumps(stored))
    measured, perplexity = [], measurements.perplexity

    def counted(*arguments, **options):
        measured.append(options["corpus"])
        return perplexity(*arguments, **options)

    monkeypatch.setattr(measurements, "perplexity", counted)
    run(replace(settings))
    assert measured == ["wikitext2", "c4"]
    assert "was begun on cuda in the stored dtype: doing it anew" in caplog.text
