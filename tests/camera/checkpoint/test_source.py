"""Where a model is, and what its fingerprint sees of it."""

import os
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from camera.checkpoint import source
from camera.checkpoint.source import fingerprint, resolve_model, revision_of
from camera.runtime import files
from camera.runtime.errors import CameraError
from tests.helpers.models import build_model, build_tokenizer


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    wide = dict(hidden_size=64, moe_intermediate_size=64, num_experts=16)
    build_model("qwen3_moe", **wide).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def test_a_change_of_any_tensor_is_seen(model):
    path = model / "model.safetensors"
    tensors, seen = load_file(path), {fingerprint(model)}
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor * -3}, path, {"format": "pt"})
        seen.add(fingerprint(model))
    assert len(seen) == len(tensors) + 1


def test_tokenizer_config_and_code_are_seen_and_other_files_are_not(model):
    before = fingerprint(model)
    (model / "README.md").write_text("words")
    (model / "generation_config.json").write_text("{}")
    assert fingerprint(model) == before
    for name in ("tokenizer.json", "config.json"):
        (model / name).write_text((model / name).read_text() + " ")
    (model / "modeling_x.py").write_text("x = 1")
    assert fingerprint(model) != before
    (model / "modeling_x.py").write_text("x = 2")
    assert len({before, fingerprint(model)}) == 2


def test_a_large_file_is_hashed_once_until_it_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REMEMBERED", 0)
    monkeypatch.setattr(files, "SETTLED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hashed, digest_of = [], files.digest_of
    monkeypatch.setattr(files, "digest_of", lambda path: hashed.append(path) or digest_of(path))
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 9)
    first = files.known_digest(path)
    assert files.known_digest(path) == first and len(hashed) == 1
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"b" * 9)
    os.utime(path, ns=(stamp, stamp))  # as `cp --preserve` does
    assert files.known_digest(path) != first
    for note in (tmp_path / "cache/camera").iterdir():
        note.write_text("")
    assert files.known_digest(path) == digest_of(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose main branch moves with every question; what it was asked."""
    asked = []

    def snapshot_download(name, *, revision=None, **patterns):
        asked.append(revision)
        commit = revision or f"commit{len(asked)}"
        folder = tmp_path / name / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source._commit.cache_clear()
    yield asked
    source._commit.cache_clear()


def test_a_process_sees_one_commit_of_a_hub_model(hub):
    first, second = resolve_model("own/moe", weights=False), resolve_model("own/moe")
    assert first == second and revision_of(first) == "commit1"
    assert hub == [None, "commit1", "commit1"]


def test_a_revision_can_be_asked_for(hub):
    assert revision_of(resolve_model("own/moe@v1.0")) == "v1.0"
    resolve_model("own/moe@refs/pr/1")
    assert hub[:3] == ["v1.0", "v1.0", "refs/pr/1"]
    with pytest.raises(CameraError, match="neither a folder nor a hub id"):
        resolve_model("own@v1.0")


def test_a_local_folder_has_no_revision(model):
    assert resolve_model(str(model)) == Path(model) and revision_of(model) is None
