"""`camera.evaluate` and `camera.load`: a folder or a model, the same numbers, plain refusals."""

import pytest
import torch

import camera
from camera.checkpoint.loading import load_tokenizer
from camera.evaluation.perplexity import perplexity
from camera.runtime.errors import CameraError


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("qwen2_moe")


@pytest.fixture
def sizes(data_folder):
    return dict(data=data_folder, length=48, blocks=3, progress=False)


def test_a_folder_a_model_and_a_streamed_folder_give_the_same_numbers(folder, sizes):
    model, tokenizer = camera.load(folder, device="cpu"), load_tokenizer(folder)
    expected = {
        corpus: perplexity(
            model, tokenizer, corpus=corpus, data=sizes["data"], length=48, limit=3, progress=False
        )["perplexity"]
        for corpus in ("wikitext2", "c4")
    }
    for found in (
        camera.evaluate(folder, device="cpu", **sizes),
        camera.evaluate(model, tokenizer, **sizes),
        camera.evaluate(folder, device="cpu", stream="always", **sizes),
    ):
        told = {name: part["perplexity"] for name, part in found["perplexity"].items()}
        assert told == pytest.approx(expected, rel=1e-4)
        assert found["tasks"] == {} and found["average"] is None


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_a_name_or_torch_s_own(dtype, folder):
    model = camera.load(
        folder, device=torch.device("cpu"), dtype=dtype, attn_implementation="eager"
    )
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda model: camera.load(model, dtyp="float32"), "did you mean dtype"),
        (lambda model: camera.evaluate(model, taks=["boolq"]), "did you mean tasks"),
        (lambda model: camera.compress(model, "camera_p", "out", sed=1), "did you mean seed"),
        (lambda model: camera.compress(model, "camera_p", "out", sparsty=1), "mean sparsity"),
        (lambda model: camera.evaluate(model, perplexity=()), "nothing to measure"),
        (lambda model: camera.evaluate(camera.load(model)), "needs the tokenizer"),
        (lambda model: camera.load(model.parent / "nowhere"), "neither a folder nor"),
        (lambda model: camera.load(model.parent), "no config.json"),
    ],
)
def test_a_wrong_call_is_one_sentence_with_what_is_right(call, told, folder):
    with pytest.raises(CameraError, match=f"(?i){told}"):
        call(folder)
