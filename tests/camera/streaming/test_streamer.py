"""Streaming one layer at a time equals the whole model in memory, on every family."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from camera.calibration.scores.energy import EnergyObserver
from camera.checkpoint.shards import INDEX
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer
from tests.helpers.models import FAMILIES, build_model


def last_hidden(model, batch):
    """Hidden states after the last layer, before the final norm."""
    seen = {}
    hook = model.model.layers[-1].register_forward_hook(lambda m, a, out: seen.update(h=out))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen["h"][0] if isinstance(seen["h"], tuple) else seen["h"]


def padded_batches():
    ids = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 7, 0)):
        mask[row, :pads] = 0
    ids = torch.where(mask.bool(), ids, 0)
    pairs = zip(ids.split(2), mask.split(2), strict=True)
    return [{"input_ids": i, "attention_mask": m} for i, m in pairs]


def plain_batches():
    return [{"input_ids": batch["input_ids"]} for batch in padded_batches()]


@pytest.mark.parametrize("split_pass", [False, True], ids=["one pass", "observe then forward"])
@pytest.mark.parametrize("make", [plain_batches, padded_batches])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_the_whole_model(family, make, split_pass, checkpoints):
    folder, batches = checkpoints(family), make()
    streamer = LayerStreamer(MetaModel(folder))
    states = streamer.embed(batches)
    for i in range(len(streamer.model.layers)):
        streamer.load_layer(i)
        inputs = streamer.attend(i, states)
        observer = EnergyObserver(streamer.model.feed_forward(i))
        if split_pass:
            streamer.observe(i, inputs, observer)
            states = streamer.run_layer(i, inputs)
        else:
            states = streamer.forward(i, inputs, observer)
        streamer.model.free_layer(i)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for batch, state in zip(batches, states, strict=True):
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        expected = last_hidden(model, batch)
        torch.testing.assert_close(state.hidden_BLH[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_finished_from_phi_is_the_layer(family, checkpoints):
    streamer = LayerStreamer(MetaModel(checkpoints(family)))
    layer = streamer.load_layer(0) and streamer.model.feed_forward(0)
    everything = {
        group.path: [torch.arange(width) for width in group.widths] for group in layer.groups
    }
    states = []
    for finish in ("phi", "module"):
        inputs = streamer.attend(0, streamer.embed(padded_batches()))
        if finish == "phi":
            states.append(streamer.project(0, streamer.keep_phi(0, inputs, None), everything))
        else:
            states.append(streamer.run_layer(0, inputs))
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one.hidden_BLH, other.hidden_BLH, rtol=1e-5, atol=1e-5)


def test_batches_are_there_once(checkpoints):
    """What takes several batches on uses its list up; what only looks leaves it as it is."""
    streamer = LayerStreamer(MetaModel(checkpoints("qwen2_moe")))
    states = streamer.embed(plain_batches())
    streamer.load_layer(0)
    inputs = streamer.attend(0, states)
    assert not states and len(inputs) == 2
    streamer.observe(0, inputs, None)
    assert len(inputs) == 2
    states = streamer.forward(0, inputs)
    assert not inputs and len(states) == 2


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "llama"])
def test_attention_runs_once_per_layer_and_batch(family, checkpoints):
    streamer = LayerStreamer(MetaModel(checkpoints(family)))
    states = streamer.embed(plain_batches())
    layers, batches = len(streamer.model.layers), len(states)
    calls = []
    for i in range(layers):
        layer = streamer.load_layer(i)
        layer.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i))
        inputs = streamer.attend(i, states)
        streamer.observe(i, inputs, EnergyObserver(streamer.model.feed_forward(i)))
        states = streamer.run_layer(i, inputs)
        streamer.model.free_layer(i)
    assert calls == [i for i in range(layers) for _ in range(batches)]


@pytest.mark.parametrize("family", FAMILIES)
def test_never_more_than_one_layer_is_in_memory(family, checkpoints):
    model = MetaModel(checkpoints(family))
    streamer = LayerStreamer(model)

    def live():
        return {n for n, p in model.model.named_parameters() if p.device.type != "meta"}

    states = streamer.embed(plain_batches())
    assert not live()
    for i in range(len(model.layers)):
        streamer.load_layer(i)
        assert live() == {f"model.layers.{i}.{n}" for n, _ in model.layers[i].named_parameters()}
        states = streamer.run_layer(i, streamer.attend(i, states))
        model.free_layer(i)
        assert not live()


@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
def test_one_file_and_many_shards_read_the_same(shard_size, tmp_path):
    model = build_model("deepseek_v2")
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    layer = MetaModel(tmp_path).load_layer(2)
    for name, tensor in model.model.layers[2].state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


def test_native_fused_keys_are_read_too(tmp_path):
    model = build_model("qwen3_moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    layer = MetaModel(tmp_path).load_layer(1)
    assert torch.equal(layer.mlp.experts.down_proj, model.model.layers[1].mlp.experts.down_proj)


def remove(folder, name):
    """Take a tensor out of its shard and out of the index."""
    index = json.loads((folder / INDEX).read_text())
    shard = folder / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    (folder / INDEX).write_text(json.dumps(index))


def damaged(checkpoints, tmp_path, family="qwen2_moe"):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints(family), folder)
    return folder


def test_a_missing_shard_is_refused_by_name(checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CameraError, match=f"{shard.name}.*missing"):
        MetaModel(folder)


def test_a_truncated_shard_is_refused_by_name(checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CameraError, match=f"{shard.name} is truncated or corrupt"):
        MetaModel(folder)


def test_a_shard_without_its_tensor_is_refused_by_name(checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.0.nowhere.weight"] = sorted(folder.glob("*.safetensors"))[
        0
    ].name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CameraError, match=r"tensor 'model\.layers\.0\.nowhere\.weight' is not in"):
        MetaModel(folder)


def test_a_truncated_index_is_refused_by_name(checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    (folder / INDEX).write_text((folder / INDEX).read_text()[:50])
    with pytest.raises(CameraError, match=f"{INDEX} is no valid index"):
        MetaModel(folder)


def test_pickled_weights_are_refused(checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CameraError, match=r"pickled weights only \(pytorch_model.bin\)"):
        MetaModel(folder)


def test_a_folder_without_weights_is_refused(checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    with pytest.raises(CameraError, match="holds no model"):
        MetaModel(folder)


def test_a_missing_tensor_is_refused_by_name(checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    remove(folder, "model.layers.1.post_attention_layernorm.weight")
    with pytest.raises(CameraError, match=r"lacks tensor 'model\.layers\.1\.post_attention_layer"):
        MetaModel(folder).load_layer(1)


def test_missing_embeddings_are_refused_by_name(checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    remove(folder, "model.embed_tokens.weight")
    with pytest.raises(CameraError, match=r"lacks tensor 'model\.embed_tokens\.weight'"):
        LayerStreamer(MetaModel(folder)).embed(plain_batches())


def edit(folder, name, change):
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, shard, metadata={"format": "pt"})
            return
    raise AssertionError(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_weights_are_refused_by_name(value, checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    edit(
        folder,
        "model.layers.1.self_attn.q_proj.weight",
        lambda w: w.index_fill(0, torch.tensor([3]), value),
    )
    with pytest.raises(CameraError, match=r"layers\.1\.self_attn\.q_proj\.weight.*NaN or inf"):
        MetaModel(folder).load_layer(1)


def test_overflowing_activations_are_refused_with_the_layer(checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    edit(folder, "model.layers.1.mlp.shared_expert.down_proj.weight", lambda w: w * 0 + 3e38)
    streamer = LayerStreamer(MetaModel(folder))
    states = streamer.embed(plain_batches())
    streamer.load_layer(0)
    states = streamer.run_layer(0, streamer.attend(0, states))
    streamer.load_layer(1)
    inputs = streamer.attend(1, states)
    with pytest.raises(CameraError, match="after layer 1 hold NaN or inf"):
        streamer.run_layer(1, inputs)


def test_a_tensor_of_the_wrong_shape_is_refused_by_name(checkpoints, tmp_path):
    folder = damaged(checkpoints, tmp_path)
    edit(folder, "model.layers.1.self_attn.o_proj.weight", lambda w: w[:5].clone())
    with pytest.raises(CameraError, match=r"o_proj\.weight.*shape"):
        MetaModel(folder).load_layer(1)


def test_an_unknown_model_type_names_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    with pytest.raises(CameraError, match=r"'gpt2' is not supported.*qwen3_moe"):
        MetaModel(tmp_path)


def test_a_model_type_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(CameraError, match="no_such_type"):
        MetaModel(tmp_path)


def test_layers_that_return_tuples_are_unwrapped():
    from camera.moe.capture import unwrap

    hidden = torch.randn(2, 3, 4)
    assert unwrap((hidden, None)) is hidden
    assert unwrap(hidden) is hidden  # a tensor is not indexed: [0] would take batch element 0


def test_experts_stored_in_another_layout_are_refused():
    from camera.moe.experts.group import RoutedExperts

    odd = nn.Module()
    odd.is_transposed, odd.down_proj = True, nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(CameraError, match=r"transposed.*no declaration can give this layout"):
        RoutedExperts("model.layers.0.mlp.experts", odd)
