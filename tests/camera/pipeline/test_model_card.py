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


def test_settings_of_a_refit_are_told_where_there_is_one(result):
    refit = {"target": "dense", "ridges": [1.0], "sweeps": 8, "held_out": 0.125}
    for compensate, told in (("none", False), ("layer", True)):
        settings = {"sparsity": 0.4, "compensate": compensate, **refit}
        card = model_card(dataclasses.replace(result, settings=settings))
        assert "sparsity=0.4" in card and f"compensate={compensate}" in card
        assert [f"{key}={value}" in card for key, value in refit.items()] == [told] * 4


def test_the_version_that_made_it_is_told(result):
    card = model_card(dataclasses.replace(result, versions={"camera-moe": "9.8", "torch": "7.6"}))
    assert "| made by | camera-moe 9.8, torch 7.6 |" in card


@pytest.mark.parametrize(
    ("method", "paper"), [("camera_p", "2508.02322"), ("heapr", "2509.22299"), ("random", None)]
)
def test_the_paper_of_the_method_is_linked(method, paper, result):
    card = model_card(dataclasses.replace(result, method=method))
    assert (f"| paper | https://arxiv.org/abs/{paper} |" in card) == (paper is not None)
    assert card.count("| paper |") == (paper is not None)


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
