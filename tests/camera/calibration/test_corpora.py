"""Where text comes from: the offline layout, local files, the hub, the mirror between them."""

import gzip
import json
import os
import subprocess
import sys

import datasets
import pytest

from camera.calibration.corpora import (
    check_corpus,
    data_folder,
    find_corpus,
    layout_file,
    load_documents,
    read_jsonl,
    rows_hash,
)
from camera.evaluation.tasks import definitions
from camera.runtime.errors import CameraError
from experiments.commands.mirror import main, mirror

WIKI = ["", " = Title = \n", "", " A line . \n", " Second line\u2028with a break . \n", ""]
WEB = [{"text": f"page {i} é"} for i in range(5)]
PIQA = [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers from memory and remembers what it was asked."""
    asked = []

    def load_dataset(path, name=None, *, split, data_files=None, revision=None):
        pinned = path not in ("Salesforce/wikitext", "allenai/c4") or len(revision) == 40
        assert pinned, "a push to the hub would change results"
        asked.append((path, name, split, data_files))
        rows = {"Salesforce/wikitext": [{"text": line} for line in WIKI], "allenai/c4": WEB}
        return datasets.Dataset.from_list(rows.get(path, PIQA))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_wikitext_has_the_lines_of_the_hub_column(tmp_path):
    # The raw file: a blank line is " \n" there, and "" in the hub's column.
    (tmp_path / "wikitext2").mkdir()
    raw = "".join(line or " \n" for line in WIKI)
    (tmp_path / "wikitext2/test.txt").write_text(raw, encoding="utf-8", newline="")
    assert load_documents(tmp_path, "wikitext2", "test") == WIKI


def test_hub_and_mirror_give_the_same_documents(tmp_path, hub):
    written = mirror(tmp_path, c4_documents=3, tasks=["piqa"], report=lambda _: None)
    assert len(written) == 6
    for split in ("train", "validation", "test"):
        assert load_documents(tmp_path, "wikitext2", split) == WIKI
        assert list(load_documents("hub", "wikitext2", split)) == WIKI
    pages = [row["text"] for row in WEB]
    assert load_documents(tmp_path, "c4", "validation") == pages[:3]
    assert list(load_documents("hub", "c4", "validation")) == pages
    assert rows_hash(read_jsonl(tmp_path / "tasks/piqa.jsonl.gz")) == rows_hash(PIQA)
    assert ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None) in hub
    shard = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert ("allenai/c4", None, "validation", shard) in hub
    assert ("baber/piqa", None, "validation", None) in hub


def test_mirror_is_resumed_and_repeats_its_bytes(tmp_path, hub):
    quiet = {"tasks": ["piqa"], "report": lambda _: None}
    first = mirror(tmp_path / "a", **quiet)
    assert mirror(tmp_path / "a", **quiet) == []
    assert mirror(tmp_path / "a", force=True, **quiet) == first
    for path, again in zip(first, mirror(tmp_path / "b", **quiet), strict=True):
        assert path.read_bytes() == again.read_bytes()
    first[0].unlink()
    assert mirror(tmp_path / "a", **quiet) == first[:1]


def test_a_broken_download_leaves_no_file(tmp_path, hub, monkeypatch):
    def broken(*_, **__):
        yield WEB[0]
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.commands.mirror.download", broken)
    with pytest.raises(KeyboardInterrupt):
        mirror(tmp_path, report=lambda _: None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_mirror_command(tmp_path, hub, capsys, monkeypatch):
    assert main([str(tmp_path), "--c4-documents", "2", "--tasks", "piqa"]) == 0
    assert "c4/train.jsonl.gz (2 rows of allenai/c4)" in capsys.readouterr().out
    assert main([str(tmp_path), "--c4-documents", "0"]) == 1
    assert "--c4-documents 0" in capsys.readouterr().err
    # lm-eval's whole index takes a quarter of a minute to read; the nine's stands in for it.
    nine = definitions.task_manager(True)
    monkeypatch.setattr(definitions, "task_manager", lambda only_nine: nine)
    assert main([str(tmp_path), "--tasks", "piqqa"]) == 1
    assert "did you mean piqa" in capsys.readouterr().err


def test_mirror_refuses_a_folder_that_cannot_be_written(tmp_path, hub):
    (tmp_path / "file").write_text("")
    with pytest.raises(CameraError, match="choose another folder"):
        mirror(tmp_path / "file", report=lambda _: None)


def test_local_files_are_corpora(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("One.\n\nTwo.\n")
    pages = tmp_path / "pages.jsonl"
    pages.write_text('{"text": "a"}\n\n{"text": "b", "url": "x"}\n')
    packed = tmp_path / "pages.jsonl.gz"
    write_jsonl(packed, WEB)
    assert load_documents("hub", str(text), "train") == ["One.\n\nTwo.\n"]
    assert load_documents("hub", str(pages), "train") == ["a", "b"]
    assert load_documents("hub", str(packed), "any") == [row["text"] for row in WEB]
    assert find_corpus(str(text)).separator == "\n\n"
    assert find_corpus(str(pages)).separator is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"txt": "x"}\n', "row 1 has no string field `text`"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.jsonl.gz", b"plain", "can't be read as gzipped"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n', mtime=0)[:-9], "can't be read as gzipped"),
        ("a.txt", b"\xff\xfe\xfa", "can't be read as UTF-8"),
        ("a.txt", b" \n", "holds no text"),
        ("a.parquet", b"PAR1", "suffix says neither text"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CameraError, match=says) as error:
        load_documents("hub", str(tmp_path / name), "train")
    assert name in str(error.value)


def test_absences_are_named(tmp_path):
    with pytest.raises(CameraError, match=r"corpus=pile: neither a known corpus \(wikitext2, c4\)"):
        check_corpus(tmp_path, "pile", "train")
    with pytest.raises(CameraError, match=r"calibration.source=c4: no split 'test'"):
        check_corpus(tmp_path, "c4", "test", key="calibration.source")
    with pytest.raises(CameraError, match=r"data=.*c4/train.jsonl.gz is missing.*camera mirror"):
        check_corpus(tmp_path, "c4", "train")
    with pytest.raises(CameraError, match=r"no such folder.*data=hub"):
        data_folder(tmp_path / "nowhere")
    assert data_folder("hub") is None
    assert layout_file("hub", "c4/train.jsonl.gz") is None
    check_corpus("hub", "c4", "train")


def test_a_hub_out_of_reach_names_the_way_out(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        CameraError, match=r"Salesforce/wikitext .*Couldn't reach.*data=DIR"
    ) as error:
        load_documents("hub", "wikitext2", "test")
    assert "\n" not in str(error.value)


def test_rows_hash_ignores_key_order_only():
    assert rows_hash([{"a": 1, "b": "é"}]) == rows_hash([{"b": "é", "a": 1}])
    assert rows_hash([{"a": 1}, {"a": 2}]) != rows_hash([{"a": 2}, {"a": 1}])


def test_the_library_needs_neither_lm_eval_nor_datasets_to_be_imported():
    code = (
        "import sys, camera.calibration.tokens, camera.evaluation.perplexity;"
        "import camera.evaluation.tasks.evaluate;"
        "print([m for m in ('lm_eval', 'datasets', 'hydra', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"
