"""The card's header is YAML whatever the model is called, and names no place of this machine."""

import dataclasses
import shutil

import pytest
import yaml

import camera
from camera.pipeline.model_card import base_name, model_card


@pytest.fixture(scope="module")
def result(checkpoints):
    return camera.describe(checkpoints("qwen2_moe"))


@pytest.mark.parametrize("name", ["1234567", "a: b #c", "own/moe", "true", 'it"s', "模型", "- x"])
def test_the_header_reads_as_the_name(name, result):
    card = model_card(dataclasses.replace(result, model=name))
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == name
    assert header["library_name"] == "transformers"


def test_a_bar_ends_no_cell(result):
    settings = {"target": "a|b"}
    card = model_card(dataclasses.replace(result, model="x|y", settings=settings))
    assert "| settings | target=a\\|b |" in card and "| base model | x\\|y |" in card


def test_a_model_of_the_hubs_cache_has_its_hub_id(tmp_path, monkeypatch):
    cached = tmp_path / "models--own--moe" / "snapshots" / "0123abc"
    cached.mkdir(parents=True)
    assert base_name(cached) == "own/moe"
    assert base_name("own/moe") == "own/moe"
    (tmp_path / "mymodel").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert base_name("~/mymodel") == "mymodel"


def test_compress_names_a_cached_model_by_its_hub_id(checkpoints, tmp_path):
    cached = tmp_path / "models--own--moe" / "snapshots" / "0123abc"
    shutil.copytree(checkpoints("qwen2_moe"), cached)
    out = tmp_path / "out"
    done = camera.compress(cached, "random", out, sparsity=0.2, device="cpu", progress=False)
    assert done.model == "own/moe"
    assert yaml.safe_load((out / "README.md").read_text().split("---\n")[1])["base_model"] == (
        "own/moe"
    )
