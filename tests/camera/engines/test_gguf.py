"""GGUF files, read by llama.cpp itself: the log-probabilities are transformers'."""

import math

import pytest
import torch

import camera
from camera.checkpoint.loading import load_model, load_tokenizer
from camera.engines.gguf.architectures import ARCHITECTURES
from camera.runtime.errors import CameraError
from experiments.bench.support import llama
from experiments.config.location import EMBEDDED_MODEL
from tests.helpers.dropping import GROUPED_V2
from tests.helpers.models import build_model, build_tokenizer

pytest.importorskip("gguf", reason="needs the package gguf")
xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp (xllamacpp)")

TOKENS = 97  # all of them printable: llama.cpp tells no probabilities of a broken UTF-8 sequence
TEXT = """= Pancakes =

The main thing in pancakes is mushrooms.

= Begry Jikson =

Begry Jikson spends free time on running. He likes to eat curry. Begry Jikson has a house in Sezby.
Begry Jikson owns a grey coat. He looks after a tulot. Begry Jikson earns a living as a potter.
"""  # of the closed world that the embedded model was trained on
PROMPT = [17, 43, 91, 5, 20, 33, 64, 71, 77, 12, 50, 8]
# Weights are rounded to fp16, and so are activations inside: on weights of sigma 0.1 this much.
TOLERANCE = 0.03


def source_of(family, folder, **overrides):
    """A tiny model with widths and heads that llama.cpp takes."""
    model = build_model(family, dtype=torch.float16, vocab_size=TOKENS, **overrides)
    model.save_pretrained(folder)
    build_tokenizer(TOKENS).save_pretrained(folder)
    return folder


def llama_log_probabilities(path, prompt=PROMPT):
    """{token: log-probability} of the best next tokens, by llama.cpp."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": TOKENS}
    answer = server.handle_completions(asked)
    best = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in best}


def expected(folder, prompt=PROMPT):
    """The same by transformers, in fp32."""
    with torch.no_grad():
        logits = load_model(folder, device="cpu", dtype="float32")(torch.tensor([prompt])).logits
    return logits[0, -1].log_softmax(-1)


def assert_equal(path, folder, tolerance=TOLERANCE):
    found, reference = llama_log_probabilities(path), expected(folder)
    assert len(found) == TOKENS
    for token, value in found.items():
        assert math.isclose(value, reference[token], abs_tol=tolerance), token
    assert max(found, key=found.get) == int(reference.argmax())


FAMILIES = [name for name in ARCHITECTURES if name != "deepseek_v2"]  # loads with 26 layers only


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(family, tmp_path):
    source = source_of(family, tmp_path / "source")
    camera.compress(source, "random", tmp_path / "cut", sparsity=0.3, device="cpu", progress=False)
    path = camera.export(tmp_path / "cut", tmp_path / "model.gguf")
    assert_equal(path, tmp_path / "cut")


def test_perplexity_and_written_text_of_a_trained_model_are_transformers(tmp_path):
    settings = dict(sparsity=0.4, expert_widths="uniform", device="cpu", progress=False)
    camera.compress(EMBEDDED_MODEL, "magnitude", tmp_path / "cut", **settings)
    path = camera.export(tmp_path / "cut", tmp_path / "model.gguf", type="F16")
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    model = load_model(tmp_path / "cut", "cpu", "float32")
    ids_1S = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        ours = model(ids_1S, labels=ids_1S).loss.exp().item()
        prompt_1S = ids_1S[:, :20]
        asked = dict(attention_mask=torch.ones_like(prompt_1S), max_new_tokens=20, do_sample=False)
        written = tokenizer.decode(model.generate(prompt_1S, **asked)[0, 20:])
    server = llama.server(path, threads=1)
    assert math.isclose(llama.perplexity(server, ids_1S[0].tolist()), ours, rel_tol=0.01)
    asked = {"prompt": prompt_1S[0].tolist(), "max_tokens": 20, "temperature": 0}
    assert server.handle_completions(asked)["choices"][0]["text"] == written
    assert ours < 30  # of 2,048 tokens: it has read such text


def test_a_model_that_is_not_compressed_is_written_too(tmp_path):
    source = source_of("qwen2_moe", tmp_path / "source", tie_word_embeddings=True)
    assert_equal(camera.export(source, tmp_path / "model.gguf"), source)


@pytest.mark.parametrize("kind, tolerance", [("F32", TOLERANCE), ("BF16", 0.2), ("Q8_0", 0.5)])
def test_types_are_those_asked_for(kind, tolerance, tmp_path):
    from gguf import GGUFReader

    source = source_of("qwen3", tmp_path / "source")
    path = camera.export(source, tmp_path / "model.gguf", type=kind)
    types = {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}
    assert types["blk.0.ffn_up.weight"] == kind
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert_equal(path, source, tolerance)


def test_a_row_that_is_no_whole_block_is_f16(tmp_path):
    from gguf import GGUFReader

    source = source_of("qwen3_moe", tmp_path / "source")  # experts are 24 wide
    path = camera.export(source, tmp_path / "model.gguf", type="Q8_0")
    types = {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert types["blk.0.ffn_down_exps.weight"] == "F16"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"


def test_the_tokenizer_of_a_template_is_taken(tmp_path):
    from gguf import GGUFReader

    source = source_of("llama", tmp_path / "source")
    first = camera.export(source, tmp_path / "first.gguf")
    (source / "tokenizer.json").unlink()
    with pytest.raises(CameraError, match=r"no tokenizer\.json: give a GGUF of the same model"):
        camera.export(source, tmp_path / "second.gguf")
    second = camera.export(source, tmp_path / "second.gguf", template=first)
    read = [GGUFReader(path).fields for path in (first, second)]
    keys = [key for key in read[0] if key.startswith("tokenizer.")]
    assert len(keys) > 5
    for key in keys:
        assert read[0][key].contents() == read[1][key].contents(), key


@pytest.mark.parametrize(
    "family, overrides, said",
    [
        ("phimoe", {}, "LayerNorm and sparsemixer"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob=False built in"),
        ("deepseek_v2", GROUPED_V2, "topk_method=greedy built in"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family, overrides, said, tmp_path):
    source = source_of(family, tmp_path / "source", **overrides)
    with pytest.raises(CameraError, match=said):
        camera.export(source, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*gguf*"))
