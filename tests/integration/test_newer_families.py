"""Families whose structure another one has: a short list for each, all methods for one of each."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import camera
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.loading import load_model
from camera.moe.capture import unwrap
from camera.moe.families import family_of
from camera.pruning.whole_experts import remove_experts
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer
from tests.helpers import oracles
from tests.helpers.dropping import views
from tests.helpers.models import build_model
from tests.helpers.newer_families import NEWER, REPRESENTATIVES

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


@pytest.mark.parametrize("family", NEWER)
def test_streamed_equals_the_whole_model(family, checkpoints):
    inputs, last = batch(), {}
    streamer = LayerStreamer(MetaModel(checkpoints(family)))
    states = streamer.embed([inputs])
    for index in range(len(streamer.model.layers)):
        streamer.load_layer(index)
        states = streamer.forward(index, streamer.attend(index, states))
        streamer.model.free_layer(index)
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family))
    model.base_model.layers[-1].register_forward_hook(lambda m, a, out: last.update(h=unwrap(out)))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(states[0].hidden_BLH[real], last["h"][real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", NEWER)
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
    expected = oracles.camera_p(AutoModelForCausalLM.from_pretrained(source), ids_NL, 0.3, 0.9)
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
        torch.testing.assert_close(ffn.module(x_BLH), expected, rtol=1e-4, atol=1e-6)
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
        return ffn.module(x_BLH)


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
