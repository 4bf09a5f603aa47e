"""What a checkpoint holds is what is believed, whatever config.json says of it."""

import logging

import pytest
import torch
from safetensors.torch import save_file

import baselines.micro_experts.random  # noqa: F401 (registers the method)
import camera
from camera.checkpoint.loading import load_model
from camera.checkpoint.shards import SINGLE
from camera.checkpoint.source import fingerprint
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer
from tests.helpers.checkpoints import changed, config_of, tensors_of

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
UP = "model.layers.1.mlp.experts.0.up_proj.weight"
PROJECTION = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture
def compress(tmp_path):
    """compress(source, **options): folder of a randomly pruned model, and the report."""

    def go(source, **options):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        settings = dict(sparsity=0.1, device="cpu", progress=False) | options
        return out, camera.compress(source, "random", out, **settings)

    return go


@torch.no_grad()
def logits(folder):
    return load_model(folder, device="cpu")(IDS).logits


def streamed_logits(folder):
    from camera.streaming.lm_head import lm_head_loaded
    from camera.streaming.lm_head import logits as head

    streamer = LayerStreamer(MetaModel(folder))
    states = streamer.embed([{"input_ids": IDS}])
    for i in range(len(streamer.model.layers)):
        streamer.load_layer(i)
        states = streamer.run_layer(i, streamer.attend(i, states))
        streamer.model.free_layer(i)
    with lm_head_loaded(streamer.model):
        return head(streamer.model, states[0].hidden_BLH.flatten(0, 1))


def with_head(tensors):
    torch.manual_seed(5)
    return tensors | {HEAD: torch.randn(256, 32) * 0.1}


@pytest.mark.parametrize("family", ["llama", "granitemoe"])
def test_a_tied_config_with_a_real_head_keeps_it(family, checkpoints, compress, tmp_path, caplog):
    source = changed(checkpoints(family), tmp_path / "source", with_head)
    torch.testing.assert_close(streamed_logits(source), logits(source).flatten(0, 1))
    budget = MetaModel(source).budget
    assert budget.dense.model == sum(t.numel() for t in tensors_of(source).values())
    out, _ = compress(source)
    assert torch.equal(tensors_of(out)[HEAD], tensors_of(source)[HEAD])
    assert not config_of(out).get("tie_word_embeddings", False)
    assert "tie_word_embeddings is written as false" in caplog.text
    plain = camera.export(out, tmp_path / "plain")
    torch.testing.assert_close(logits(plain), logits(out), rtol=1e-5, atol=1e-5)


def test_a_head_that_equals_the_embedding_stays_tied(checkpoints, compress, tmp_path):
    twice = changed(
        checkpoints("llama"), tmp_path / "source", lambda ts: ts | {HEAD: ts[EMBEDDING]}
    )
    out, report = compress(twice)
    assert config_of(out)["tie_word_embeddings"] and HEAD not in tensors_of(out)
    once = compress(checkpoints("llama"))[1]
    assert report.bytes["dense"] - once.bytes["dense"] < 1000  # headers of other lengths


def test_either_name_of_a_tied_pair_fills_both(checkpoints, compress, tmp_path):
    def only_head(tensors):
        return tensors | {HEAD: tensors.pop(EMBEDDING)}

    source = changed(checkpoints("llama"), tmp_path / "source", only_head)
    expected = logits(checkpoints("llama"))
    torch.testing.assert_close(streamed_logits(source), expected.flatten(0, 1))
    out, _ = compress(source)
    assert torch.equal(tensors_of(out)[EMBEDDING], tensors_of(source)[HEAD])


@pytest.mark.parametrize("said, real", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_bytes_decide_the_dtype_and_a_warning_says_so(
    said, real, checkpoints, compress, tmp_path, caplog
):
    real = getattr(torch, real)
    source = changed(
        checkpoints("qwen3_moe"),
        tmp_path / "source",
        lambda ts: {name: tensor.to(real) for name, tensor in ts.items()},
        dtype=said,
    )
    out, report = compress(source)
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {real}
    assert f"config.json says {said}" in caplog.text
    assert config_of(out)["dtype"] == str(real).removeprefix("torch.")
    assert 0.8 < report.bytes["compressed"] / report.bytes["dense"] < 1
    assert camera.describe(source).bits["model"] == 8 * real.itemsize


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_each_tensor_keeps_its_own_dtype(compute, checkpoints, compress, tmp_path, monkeypatch):
    def mixed(tensors):
        wide = (HEAD, "mlp.gate.weight")
        return {k: t if k.endswith(wide) else t.bfloat16() for k, t in tensors.items()}

    source = changed(checkpoints("qwen3_moe"), tmp_path / "source", mixed, dtype=None)
    if compute == "bfloat16":  # as on an accelerator
        monkeypatch.setattr("camera.streaming.skeleton.compute_dtype", lambda *_: torch.bfloat16)
    out, _ = compress(source)
    before, after = tensors_of(source), tensors_of(out)
    assert len({tensor.dtype for tensor in after.values()}) == 2
    for name in before.keys() & after.keys():  # all but the experts
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", [UP, PROJECTION])
def test_whole_numbers_are_not_taken_for_weights(name, dtype, checkpoints, tmp_path):
    source = changed(
        checkpoints("qwen3_moe"),
        tmp_path / "source",
        lambda ts: ts | {name: (ts[name] * 100).to(dtype)},
    )
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(CameraError, match=rf"'{name}' in .* is {kind} where the model has float"):
        MetaModel(source)


def test_whole_numbers_in_a_compressed_folder_are_refused_too(checkpoints, compress, tmp_path):
    out, _ = compress(checkpoints("qwen3_moe"))
    bad = changed(out, tmp_path / "bad", lambda ts: ts | {PROJECTION: ts[PROJECTION].char()})
    for load in (MetaModel, lambda folder: load_model(folder, device="cpu")):
        with pytest.raises(CameraError, match=rf"{PROJECTION}.* is int8"):
            load(bad)


def large(tensors):
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    tensors[PROJECTION][0, 0] = 1e5
    return tensors


def test_what_a_dtype_cannot_hold_is_not_written(checkpoints, compress, tmp_path):
    source = changed(checkpoints("qwen3_moe"), tmp_path / "source", large, dtype="float16")
    out, _ = compress(source)  # the bytes count
    assert tensors_of(out)[PROJECTION].dtype == torch.bfloat16
    with pytest.raises(CameraError, match=rf"'{PROJECTION}'.* float16 can't: set dtype=bfloat16"):
        compress(source, dtype="float16")


def test_what_leaves_a_layer_is_checked_in_the_dtype_it_is_stored_in(checkpoints):
    meta = MetaModel(checkpoints("qwen3_moe", dtype=torch.float16))
    meta.load_layer(1)
    meta.layers[1].self_attn.o_proj.weight.data[0, 0] = 1e5  # as a refit may do
    with pytest.raises(CameraError, match=rf"'{PROJECTION}' doesn't fit float16"):
        meta.take_out(meta.layers[1], "model.layers.1.")


def with_prediction_layer(tensors):
    extra = {k.replace(".2.", ".3.", 1): t for k, t in tensors.items() if ".layers.2." in k}
    return tensors | extra | {"model.layers.3.eh_proj.weight": torch.randn(32, 64)}


def test_config_promises_no_prediction_layers_that_are_left_out(
    checkpoints, compress, tmp_path, caplog
):
    plain = checkpoints("deepseek_v3")
    source = changed(plain, tmp_path / "source", with_prediction_layer, num_nextn_predict_layers=1)
    out, report = compress(source)
    assert config_of(out)["num_nextn_predict_layers"] == 0
    assert "num_nextn_predict_layers=1" in caplog.text
    caplog.clear()
    MetaModel(source)
    assert "num_nextn_predict_layers" not in caplog.text  # said once
    bare = changed(plain, tmp_path / "bare", num_nextn_predict_layers=0)
    assert abs(report.bytes["dense"] - camera.describe(bare).bytes["dense"]) < 9000  # headers


def test_tensors_nobody_uses_are_named_and_not_counted(checkpoints, compress, tmp_path, caplog):
    def more(tensors):
        rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        return tensors | rotary | {"vision_tower.weight": torch.randn(500, 500)}

    source = changed(checkpoints("qwen3_moe"), tmp_path / "source", more)
    bare = changed(checkpoints("qwen3_moe"), tmp_path / "bare")
    _, report = compress(source)
    assert "1 tensors (1.0 MB) that the model doesn't use, 'vision_tower.weight'" in caplog.text
    assert abs(report.bytes["dense"] - camera.describe(bare).bytes["dense"]) < 1000
    caplog.clear()
    compress(bare)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_more_layers_than_config_knows_are_refused(checkpoints, tmp_path):
    source = changed(checkpoints("qwen3_moe"), tmp_path / "source", num_hidden_layers=2)
    with pytest.raises(CameraError, match=r"'model\.layers\.2\..*num_hidden_layers=2"):
        MetaModel(source)


def test_more_experts_than_config_knows_are_refused(checkpoints, tmp_path):
    def more(tensors):
        return tensors | {UP.replace("experts.0", "experts.8"): tensors[UP]}

    source = changed(checkpoints("qwen3_moe"), tmp_path / "source", more)
    with pytest.raises(CameraError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        MetaModel(source)


def test_two_models_in_one_folder_are_refused(checkpoints, tmp_path):
    import shutil

    folder = tmp_path / "source"
    shutil.copytree(checkpoints("qwen3_moe"), folder)
    before = fingerprint(folder)
    save_file({"x": torch.ones(3)}, folder / "consolidated.safetensors")
    assert fingerprint(folder) == before  # nobody reads that file
    save_file(tensors_of(folder), folder / SINGLE, metadata={"format": "pt"})
    for load in (MetaModel, lambda folder: load_model(folder, device="cpu")):
        with pytest.raises(CameraError, match=r"model\.safetensors and .*index\.json.*remove one"):
            load(folder)


def test_an_adapter_among_the_weights_is_refused(checkpoints, tmp_path):
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    source = changed(
        checkpoints("qwen3_moe"), tmp_path / "source", lambda ts: ts | {name: torch.randn(4, 32)}
    )
    with pytest.raises(CameraError, match=rf"'{name}'.* part of an adapter: merge"):
        MetaModel(source)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_refused(file, checkpoints, compress, tmp_path):
    source = changed(checkpoints("qwen3_moe"), tmp_path / "source")
    (source / file).write_text('{"peft_type": "LORA"}')
    for use in (compress, camera.describe, load_model):
        with pytest.raises(CameraError, match=rf"adapter \({file}\): merge"):
            use(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_buffer_is_refused(value, checkpoints, tmp_path):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    source = changed(
        checkpoints("deepseek_v3"),
        tmp_path / "source",
        lambda ts: ts | {name: ts[name].index_fill(0, torch.tensor([0]), value)},
    )
    with pytest.raises(CameraError, match=rf"'{name}'.* NaN or inf"):
        MetaModel(source).load_layer(1)


@pytest.mark.parametrize("kind", ["absent", "misshapen", "NaN"])
@pytest.mark.parametrize("name", [HEAD, "model.norm.weight", "model.layers.2.mlp.gate.weight", UP])
def test_what_is_amiss_anywhere_is_found_before_the_first_layer(
    name, kind, checkpoints, compress, tmp_path, monkeypatch
):
    def spoil(tensors):
        tensor = tensors.pop(name)
        bad = {"misshapen": tensor[:5], "NaN": tensor * float("nan")}
        return tensors | ({} if kind == "absent" else {name: bad[kind]})

    source = changed(checkpoints("qwen3_moe"), tmp_path / "source", spoil)
    told = "gate_up_proj" if name == UP and kind != "NaN" else name
    monkeypatch.setattr(MetaModel, "load_layer", None)
    with pytest.raises(CameraError, match=told):
        compress(source)


@pytest.mark.parametrize(("save_dtype", "written"), [("auto", "bfloat16"), ("float32", "float32")])
def test_a_checkpoint_has_the_dtype_of_the_original_unless_another_is_asked_for(
    save_dtype, written, checkpoints, compress
):
    source = checkpoints("qwen3_moe", dtype=torch.bfloat16)
    out, result = compress(source, dtype="float32", save_dtype=save_dtype)
    assert {str(t.dtype).removeprefix("torch.") for t in tensors_of(out).values()} == {written}
    assert (result.bytes["compressed"] < result.bytes["dense"]) == (save_dtype == "auto")
    assert config_of(out)["dtype"] == written
