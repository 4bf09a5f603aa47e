"""Families whose structure another one has: a short list for each, all methods for one of each."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

import camera
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.loading import load_model
from camera.moe.capture import unwrap
from camera.moe.families import FAMILIES, family_of
from camera.moe.families.family import Family
from camera.pruning.whole_experts import remove_experts
from camera.runtime.errors import CameraError
from camera.streaming.lm_head import lm_head_loaded, logits
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer, Placement
from tests.helpers import oracles
from tests.helpers.checkpoints import changed, config_of
from tests.helpers.dropping import views
from tests.helpers.models import build_model
from tests.helpers.newer_families import NESTED, NEWER, REPRESENTATIVES

PADS = 5
CALIBRATION = camera.Calibration(source="wikitext2", samples=4, length=32)


def batch():
    """Two samples, the second one padded on the left."""
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :PADS] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def compress(checkpoints, data_folder, tmp_path):
    def go(family, method, **settings):
        out = tmp_path / method
        options = dict(calibration=CALIBRATION, data=str(data_folder), progress=False)
        camera.compress(checkpoints(family), method, out, device="cpu", **options, **settings)
        return out

    return go


STREAMED = [(family, False) for family in (*NEWER, *NESTED)]
STREAMED += [("gpt_oss", True), ("laguna", True), ("llama4", True)]


@pytest.mark.parametrize(("family", "on_disk"), STREAMED)
def test_streamed_equals_the_whole_model(family, on_disk, checkpoints):
    inputs, last = batch(), {}
    placement = Placement(experts_on_disk=on_disk)
    streamer = LayerStreamer(MetaModel(checkpoints(family)), placement)
    states = streamer.embed([inputs])
    for index in range(len(streamer.model.layers)):
        streamer.load_layer(index)
        states = streamer.forward(index, streamer.attend(index, states))
        streamer.model.free_layer(index)
    model = load_model(checkpoints(family), "cpu")
    oracles.layers_of(model)[-1].register_forward_hook(lambda m, a, out: last.update(h=unwrap(out)))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(states[0].hidden_BLH[real], last["h"][real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*NEWER, *NESTED])
def test_camera_p_equals_zeroing_in_the_whole_model(family, compress, checkpoints, data_folder):
    """Saved, loaded, and saved again; and it generates."""
    source, out = checkpoints(family), compress(family, "camera_p", sparsity=0.3, alpha=0.9)
    ids_NL = calibration_tokens(
        AutoTokenizer.from_pretrained(source),
        CALIBRATION,
        data=str(data_folder),
        seed=1234,
        max_length=128,
    ).ids_NL
    expected = oracles.camera_p(load_model(source, "cpu"), ids_NL, 0.3, 0.9)
    model = load_model(out, "cpu", "float32")
    model.save_pretrained(out.parent / "again")
    again = load_model(out.parent / "again", "cpu", "float32")
    with torch.no_grad():
        logits = model(ids_NL[:2]).logits
        torch.testing.assert_close(logits, expected(ids_NL[:2]).logits, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(again(ids_NL[:2]).logits, logits, rtol=1e-5, atol=1e-5)
        few = dict(max_new_tokens=3, do_sample=False)
        made = model.generate(ids_NL[:1, :8], **few)
        assert torch.equal(made, expected.generate(ids_NL[:1, :8], **few))


@pytest.mark.parametrize("family", NEWER)
def test_without_some_experts_the_router_chooses_as_if_they_were_never_chosen(family):
    """A smaller layer is the whole one whose router may not choose what was removed."""
    ffn = next(iter(views(build_model(family)).values()))
    x_BLH = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(1))
    stay = [0, 2, 3, 5, 6]
    with torch.no_grad():
        expected = _never_choosing(ffn, stay, x_BLH)
        remove_experts(ffn, stay)
        found = unwrap(ffn.module(x_BLH))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert ffn.routed.module.down_proj.shape[0] == len(stay)


def _never_choosing(ffn, stay, x_BLH):
    """The layer's output where the router's logits, and what it adds to them, say never."""
    from torch.overrides import TorchFunctionMode

    gone = [expert for expert in range(8) if expert not in stay]

    class Barred(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.linear and out.shape[-1] == 8:
                out = out.index_fill(-1, torch.tensor(gone), -60.0)
            return out

    for *_, tensor in _biases(ffn):
        tensor.data.index_fill_(-1, torch.tensor(gone), -9.0)
    with Barred():
        return unwrap(ffn.module(x_BLH))


def _biases(ffn):
    from camera.moe.routing import rows_of_experts

    return [part for part in rows_of_experts(ffn) if part[1].endswith("bias")]


METHODS = {
    "camera_plus": dict(sparsity=0.3),
    "camera_q": dict(bits=3.5, group_size=8),
    "heapr": dict(sparsity=0.3),
    "reap": dict(sparsity=0.3, sparsity_of="routed", routing_weights="softmax"),
    "naee": dict(sparsity=0.3, sparsity_of="routed"),
    "d2_moe": dict(sparsity=0.3),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", REPRESENTATIVES.values())
def test_every_kind_of_method(family, method, compress):
    settings = METHODS[method]
    if method == "camera_plus" and family_of(family).output_norm:
        with pytest.raises(CameraError, match="adds it through 'post_mlp_layernorm'"):
            compress(family, method, **settings)
        settings = settings | dict(target="layer", token_weights="uniform")
    out = compress(family, method, **settings)
    model = load_model(out, "cpu", "float32")
    inputs = batch()
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", REPRESENTATIVES.values())
def test_exported_it_is_a_native_model_with_the_same_logits(family, compress):
    out = compress(family, "camera_p", sparsity=0.3)
    native = AutoModelForCausalLM.from_pretrained(camera.export(out, out.parent / "native"))
    assert family_of(family).keys.experts and not hasattr(native.config, "quantization_config")
    inputs = batch()
    with torch.no_grad():
        expected = load_model(out, "cpu", "float32")(**inputs, use_cache=False).logits
        torch.testing.assert_close(
            native(**inputs, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", NESTED)
def test_what_is_not_the_decoder_of_a_model_of_text_and_images_is_copied(
    family, checkpoints, compress
):
    """Both tower and processor; it loads as the class that the source names."""
    source = checkpoints(family)
    (source / "preprocessor_config.json").write_text("{}")
    before = AutoModelForImageTextToText.from_pretrained(source).state_dict()
    for method in ("reap", "camera_q") if family == "llama4" else ("camera_q",):
        out = compress(family, method, **METHODS[method])
        assert config_of(out)["architectures"] == config_of(source)["architectures"]
        model = AutoModelForImageTextToText.from_pretrained(out).eval()
        layers = f"{family_of(family).tower}.layers."
        outside = {k: v for k, v in model.state_dict().items() if layers not in k}
        assert any("vis" in name for name in outside)
        assert all(torch.equal(tensor, before[name]) for name, tensor in outside.items())
        assert (out / "preprocessor_config.json").exists()
        assert "AutoModelForImageTextToText.from_pretrained" in (out / "README.md").read_text()
        assert type(model).__name__ == config_of(source)["architectures"][0]
        with torch.no_grad():
            assert model(**batch()).logits.isfinite().all()


@pytest.mark.parametrize("family", NESTED)
def test_layers_one_by_one_end_in_the_logits_of_the_whole_model(family, checkpoints):
    skeleton = MetaModel(checkpoints(family))
    hidden_TH = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    whole = load_model(checkpoints(family), "cpu")
    tower = oracles.decoder_of(whole)
    with torch.no_grad(), lm_head_loaded(skeleton):
        expected = whole.get_output_embeddings()(tower.norm(hidden_TH))
        torch.testing.assert_close(logits(skeleton, hidden_TH), expected)


def test_samples_longer_than_what_a_layer_attends_to_are_refused(checkpoints):
    """Layers are handed the tokens of the one before; all of them, while these are few."""
    streamer = LayerStreamer(MetaModel(checkpoints("glm_moe_dsa")))
    assert streamer.embed([{"input_ids": torch.ones(1, 64, dtype=torch.long)}])
    with pytest.raises(CameraError, match=r"attends to 64 tokens.* which of 65: set calibration"):
        streamer.embed([{"input_ids": torch.ones(1, 65, dtype=torch.long)}])


def test_heads_for_several_tokens_are_left_out_with_a_line(checkpoints, tmp_path, caplog):
    """Qwen3-Next has experts in its own, below a name that looks like a layer's."""
    key = "mtp.layers.0.mlp.experts.0.up_proj.weight"
    add = lambda tensors: {**tensors, key: torch.zeros(24, 32)}  # noqa: E731
    source = changed(checkpoints("qwen3_next"), tmp_path / "source", add)
    model = MetaModel(source)
    assert f"'{key}' first: they are left out" in caplog.text
    assert key in model.reader.left_out


ODD = {  # model type -> its config, a declaration, and what is told of it
    "nemotron_h": (
        dict(n_routed_experts=4, moe_intermediate_size=24, layers_block_type=["moe"]),
        Family(ffn="mixer"),
        "the decoder NemotronHModel has no 'embed_tokens', but embeddings, layers, norm_f",
    ),
    "jetmoe": (
        dict(num_local_experts=4, intermediate_size=24, kv_channels=8, num_key_value_heads=2),
        Family(experts="input_linear", router="router"),
        r"layers\.0\.mlp\.input_linear.*ParallelExperts: weight \[4, 48, 32\]; code of its own",
    ),
}


@pytest.mark.parametrize("model_type", ODD)
def test_an_unknown_layout_is_refused_with_what_was_found(model_type, tmp_path, monkeypatch):
    sizes, declaration, found = ODD[model_type]
    common = dict(vocab_size=256, hidden_size=32, num_hidden_layers=1)
    config = AutoConfig.for_model(model_type, **{**common, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CameraError, match=f"'{model_type}' is not supported: declare"):
        MetaModel(tmp_path)
    monkeypatch.setitem(FAMILIES, model_type, declaration)
    with pytest.raises(CameraError, match=found):
        MetaModel(tmp_path)


OTHER_SUMS = {  # what a declaration doesn't say, and what is told
    "laguna": (dict(routed_scale=None), {}, "1 times its shared expert and 2.5 times its routed"),
    "cohere2_moe": (
        {},
        dict(shared_expert_combination_strategy="average"),
        "0.5 times its shared expert and 0.5 times its routed",
    ),
}


@pytest.mark.parametrize("family", OTHER_SUMS)
def test_a_block_that_adds_its_experts_up_otherwise_is_refused(family, checkpoints, monkeypatch):
    wrong, config, told = OTHER_SUMS[family]
    monkeypatch.setitem(FAMILIES, family, replace(family_of(family), **wrong))
    with pytest.raises(CameraError, match=told):
        MetaModel(checkpoints(family, **config))


def test_another_activation_than_the_declared_one_is_refused(checkpoints, monkeypatch):
    monkeypatch.setitem(
        FAMILIES, "gpt_oss", replace(family_of("gpt_oss"), activation=lambda _: torch.nn.SiLU())
    )
    with pytest.raises(CameraError, match=r"GptOssExperts.* don't compute act.*by their SiLU"):
        MetaModel(checkpoints("gpt_oss"))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"ffn": "feed_forward"}, "no 'feed_forward', but self_attn, mlp.*`ffn`"),
        ({"router": "router"}, "no 'router', but.*gate.*`router`"),
        ({"experts": "expert"}, "instead of the linear layers gate_proj.*`experts`"),
        ({"shared_gate": "gate_of"}, "no 'gate_of', but.*shared_expert_gate.*`shared_gate`"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused_with_the_names_there_are(
    wrong, told, checkpoints, monkeypatch
):
    family = replace(family_of("qwen2_moe"), **wrong)
    monkeypatch.setitem(FAMILIES, "qwen2_moe", family)
    with pytest.raises(CameraError, match=told):
        MetaModel(checkpoints("qwen2_moe"))
