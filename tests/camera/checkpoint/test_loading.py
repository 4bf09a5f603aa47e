"""Loading for evaluation: what can't be loaded is told in words of the folder, not of a library."""

import json

import pytest
import torch

from camera.checkpoint import loading
from camera.checkpoint.loading import load_model, load_tokenizer, require_finite
from camera.checkpoint.shards import ShardReader
from camera.runtime import files
from camera.runtime.errors import CameraError
from tests.helpers.checkpoints import changed

UP = "model.layers.1.mlp.experts.0.up_proj.weight"


def test_a_misshapen_tensor_is_told_by_name_and_shapes(checkpoints, tmp_path):
    def cut(tensors):
        return tensors | {"lm_head.weight": tensors["lm_head.weight"][:99]}

    source = changed(checkpoints("qwen3_moe"), tmp_path / "source", cut)
    told = r"'lm_head\.weight' has the shape \[99, 32\] where config\.json asks for \[256, 32\]"
    with pytest.raises(CameraError, match=told):
        load_model(source, device="cpu")


@pytest.mark.parametrize("fault", ["misshapen", "absent"])
def test_an_expert_that_does_not_fit_the_others_is_told_by_name(fault, checkpoints, tmp_path):
    def spoil(tensors):
        tensor = tensors.pop(UP)
        return tensors | ({} if fault == "absent" else {UP: tensor[:5]})

    source = changed(checkpoints("qwen3_moe"), tmp_path / "source", spoil)
    with pytest.raises(CameraError, match=r"'model\.layers\.1\.mlp\.experts\.gate_up_proj'"):
        load_model(source, device="cpu")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_folder_that_is_not_there_is_told_by_its_path(load, tmp_path):
    with pytest.raises(CameraError, match=r"nowhere is neither a folder nor a hub id"):
        load(tmp_path / "nowhere")


def test_the_home_folder_is_found(checkpoints, tmp_path, monkeypatch):
    changed(checkpoints("mixtral"), tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_model("~/mine", device="cpu")
    load_tokenizer("~/mine")


def test_a_broken_config_is_told_by_its_path(checkpoints, tmp_path):
    source = changed(checkpoints("mixtral"), tmp_path / "source")
    (source / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(CameraError, match=r"source/config\.json can't be used: .*unheard_of"):
        load_model(source, device="cpu")


def test_weights_in_another_float_are_loaded(checkpoints, tmp_path):
    halved = changed(
        checkpoints("mixtral"),
        tmp_path / "source",
        lambda ts: {k: t.half() for k, t in ts.items()},
    )
    assert load_model(halved, device="cpu").dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("piece", [2**26, 100])
def test_the_last_number_of_a_tensor_is_looked_at(piece, value, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "PIECE", piece)
    whole = checkpoints("mixtral")
    require_finite(ShardReader(whole))

    def spoil(tensors):
        tensors["lm_head.weight"][-1, -1] = value

    source = changed(whole, tmp_path / "source", spoil)
    with pytest.raises(CameraError, match=r"'lm_head\.weight' in .* holds NaN or inf"):
        require_finite(ShardReader(source))
    with pytest.raises(CameraError, match=r"'lm_head\.weight' holds NaN or inf as float32"):
        load_model(source, device="cpu")


def test_a_large_file_is_looked_through_once(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REMEMBERED", 0)
    monkeypatch.setattr(files, "SETTLED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reader = ShardReader(checkpoints("mixtral"))
    require_finite(reader)
    monkeypatch.setattr(loading, "read_places", lambda _: pytest.fail("read again"))
    require_finite(reader)
