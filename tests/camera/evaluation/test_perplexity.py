"""Perplexity against plain computations of the same conventions, and its refusals."""

import gzip
import json
import math
import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from camera.calibration.windows import ids_hash
from camera.evaluation.passages import context_length
from camera.evaluation.perplexity import perplexity
from camera.runtime.errors import CameraError
from camera.streaming import lm_head
from tests.helpers.models import build_byte_tokenizer

CONTEXT = 64


@pytest.fixture(scope="module")
def tokenizer():
    return build_byte_tokenizer()


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def data(tmp_path):
    rng = random.Random(3)
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "c4").mkdir()
    lines = ["".join(rng.choices("abcdefgh ", k=20)) + "\n" for _ in range(30)]
    (tmp_path / "wikitext2/test.txt").write_text("".join(lines))
    write_c4(tmp_path, ["".join(rng.choices("stuvwxyz ", k=k % 80 + 1)) for k in range(1600)])
    return tmp_path


def write_c4(folder, pages):
    rows = "".join(json.dumps({"text": page}) + "\n" for page in pages)
    (folder / "c4/validation.jsonl.gz").write_bytes(gzip.compress(rows.encode()))


def wikitext_ids(tokenizer, data):
    lines = (data / "wikitext2/test.txt").read_text().splitlines(keepends=True)
    return torch.tensor(tokenizer("\n\n".join(lines))["input_ids"])


@torch.no_grad()
def gptq_perplexity(model, ids, length):
    """The reference's loop, a block at a time."""
    nlls, blocks = [], len(ids) // length
    for i in range(blocks):
        batch = ids[None, i * length : (i + 1) * length]
        logits = model(batch).logits[:, :-1].double()
        mean = torch.nn.functional.cross_entropy(logits[0], batch[0, 1:])
        nlls.append(mean * length)
    return torch.exp(torch.stack(nlls).sum() / (blocks * length)).item()


@torch.no_grad()
def strided_perplexity(model, ids, length, stride):
    """The loop of the transformers documentation, by the model's own loss."""
    total, count, seen = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        batch = ids[None, begin:end]
        labels = batch.clone()
        labels[:, : -(end - seen)] = -100
        scored = (labels[:, 1:] != -100).sum().item()
        total += model(batch, labels=labels).loss.item() * scored
        count += scored
        seen = end
        if end == len(ids):
            break
    return math.exp(total / count), count


def test_blocks_side_by_side_are_gptqs(model, tokenizer, data):
    ids = wikitext_ids(tokenizer, data)
    got = perplexity(model, tokenizer, corpus="wikitext2", data=data, length=48)
    assert got["perplexity"] == pytest.approx(gptq_perplexity(model, ids, 48), rel=1e-5)
    assert got["blocks"] == len(ids) // 48 and got["tokens"] == got["blocks"] * 47
    assert got["nll_per_token"] == pytest.approx(math.log(got["perplexity"]))
    assert (got["corpus"], got["split"], got["documents"]) == ("wikitext2", "test", 30)
    json.dumps(got)


@pytest.mark.parametrize("options", [{}, {"stride": 21}, {"batch_size": 4}])
def test_the_error_of_a_perplexity_is_that_of_its_blocks(model, tokenizer, data, options):
    got = perplexity(model, tokenizer, corpus="wikitext2", data=data, length=48, **options)
    means, counts = np.array(got["nll_per_block"]), np.full(got["blocks"], 47)
    if "stride" in options:
        counts[1:] = 21
        counts[-1] = got["tokens"] - counts[:-1].sum()
    assert (means * counts).sum() / counts.sum() == pytest.approx(got["nll_per_token"])
    # A jackknife over blocks: what the mean would be without each of them.
    left = ((means * counts).sum() - means * counts) / (counts.sum() - counts)
    spread = np.sqrt((len(left) - 1) * ((left - left.mean()) ** 2).mean())
    assert got["nll_stderr"] == pytest.approx(spread, rel=0.02)


def test_one_block_has_no_error(model, tokenizer, data):
    got = perplexity(model, tokenizer, corpus="wikitext2", data=data, length=48, limit=1)
    assert got["nll_stderr"] is None and got["nll_per_block"] == [got["nll_per_token"]]


def test_length_defaults_to_the_context(model, tokenizer, data):
    assert context_length(model) == CONTEXT
    got = perplexity(model, tokenizer, corpus="wikitext2", data=data)
    assert got["length"] == got["stride"] == CONTEXT
    assert got["perplexity"] == pytest.approx(
        gptq_perplexity(model, wikitext_ids(tokenizer, data), CONTEXT), rel=1e-5
    )


@pytest.mark.parametrize("stride", [21, 32, 47])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_shorter_stride_scores_only_the_new_tokens(model, tokenizer, data, stride, batch_size):
    ids = wikitext_ids(tokenizer, data)
    got = perplexity(
        model,
        tokenizer,
        corpus="wikitext2",
        data=data,
        length=48,
        stride=stride,
        batch_size=batch_size,
    )
    expected, count = strided_perplexity(model, ids, 48, stride)
    assert got["tokens"] == count == len(ids) - 1
    assert got["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_batches_and_chunks_change_nothing(model, tokenizer, data, monkeypatch):
    def measure(**options):
        return perplexity(model, tokenizer, corpus="wikitext2", data=data, length=40, **options)

    alone = measure()
    together = measure(batch_size=3)
    assert together["nll_per_token"] == pytest.approx(alone["nll_per_token"], rel=1e-6)
    assert together["data_hash"] == alone["data_hash"]
    monkeypatch.setattr(lm_head, "HEAD_LOGITS", 2 * 7 * 257)
    assert measure(batch_size=3)["nll_per_token"] == pytest.approx(alone["nll_per_token"], rel=1e-6)
    assert measure(stride=33)["tokens"] == len(wikitext_ids(tokenizer, data)) - 1


def test_no_batch_is_padded(model, tokenizer, data):
    shapes = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    perplexity(model, tokenizer, corpus="wikitext2", data=data, length=48, stride=21, batch_size=4)
    assert {shape[1] for shape in shapes[:-1]} == {48}
    assert shapes[-1][0] == 1 and shapes[-1][1] < 48


def test_the_limit_keeps_the_first_blocks(model, tokenizer, data):
    ids = wikitext_ids(tokenizer, data)
    got = perplexity(model, tokenizer, corpus="wikitext2", data=data, length=48, limit=2)
    assert got["blocks"] == 2
    assert got["perplexity"] == pytest.approx(gptq_perplexity(model, ids[:96], 48), rel=1e-5)


def test_c4_is_256_random_segments(model, tokenizer, data):
    got = perplexity(model, tokenizer, corpus="c4", data=data, length=50, limit=20)
    whole = perplexity(model, tokenizer, corpus="c4", data=data, length=50, batch_size=64)
    with gzip.open(data / "c4/validation.jsonl.gz", "rt") as lines:
        pages = [json.loads(line)["text"] for line in lines]
    random.seed(0)
    segments = []
    for _ in range(256):
        while True:
            ids = tokenizer(pages[random.randint(0, len(pages) - 1)])["input_ids"]
            if len(ids) > 50:
                break
        start = random.randint(0, len(ids) - 50 - 1)
        segments.append(torch.tensor(ids[start : start + 50]))
    expected = gptq_perplexity(model, torch.cat(segments[:20]), 50)
    assert got["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert whole["blocks"] == 256 and whole["data_hash"] == ids_hash(torch.cat(segments))
    assert got["stream"] == "256 random segments of long documents"
    assert got["split"] == "validation"


def test_c4_without_long_documents_is_joined_and_says_so(model, tokenizer, data):
    pages = ["abc" * 5, "de" * 9, "fgh" * 20]
    write_c4(data, pages)
    got = perplexity(model, tokenizer, corpus="c4", data=data, length=30)
    ids = [token for page in pages for token in [*tokenizer(page)["input_ids"], 256]]
    assert got["perplexity"] == pytest.approx(
        gptq_perplexity(model, torch.tensor(ids), 30), rel=1e-5
    )
    assert "joined with EOS" in got["stream"] and "not comparable" in got["stream"]
    assert got["documents"] == 3


def test_a_local_file_is_a_corpus(model, tokenizer, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("hello world " * 20)
    got = perplexity(model, tokenizer, corpus=str(path), data="hub", length=32)
    ids = torch.tensor(tokenizer("hello world " * 20)["input_ids"])
    assert got["perplexity"] == pytest.approx(gptq_perplexity(model, ids, 32), rel=1e-5)


def test_the_loss_is_fp32_in_a_bf16_model(model, tokenizer, data):
    full = perplexity(model, tokenizer, corpus="wikitext2", data=data, length=48)
    half = perplexity(model.bfloat16(), tokenizer, corpus="wikitext2", data=data, length=48)
    assert half["nll_per_token"] == pytest.approx(full["nll_per_token"], rel=0.02)
    ids = wikitext_ids(tokenizer, data)
    assert half["perplexity"] == pytest.approx(gptq_perplexity(model, ids, 48), rel=1e-5)


def test_the_model_is_left_as_it_was(model, tokenizer, data):
    model.train()
    perplexity(model, tokenizer, corpus="wikitext2", data=data, limit=1)
    assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 1}, "evaluation.length=1"),
        ({"length": CONTEXT + 1}, rf"evaluation.length={CONTEXT + 1}.*context \({CONTEXT}\)"),
        ({"stride": 0}, "evaluation.stride=0"),
        ({"length": 32, "stride": 33}, "evaluation.stride=33"),
        ({"limit": 0}, "evaluation.blocks=0"),
        ({"batch_size": 0}, "evaluation.perplexity_batch_size=0"),
        ({"corpus": "pile"}, "evaluation.perplexity=pile"),
        ({"split": "dev"}, "evaluation.perplexity=wikitext2: no split 'dev'"),
        ({"corpus": "c4", "split": "train"}, "c4/train.jsonl.gz is missing"),
    ],
)
def test_what_cannot_be_is_refused(model, tokenizer, data, options, says):
    with pytest.raises(CameraError, match=says):
        perplexity(model, tokenizer, **{"corpus": "wikitext2", "data": data, **options})


@pytest.mark.parametrize("stride", [None, 10])
def test_too_little_text_is_refused(model, tokenizer, data, stride):
    (data / "wikitext2/test.txt").write_text("short\n")
    with pytest.raises(CameraError, match="has only 6 tokens, less than one block"):
        perplexity(model, tokenizer, corpus="wikitext2", data=data, stride=stride)


def test_logits_that_are_not_finite_are_refused(model, tokenizer, data):
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(CameraError, match="not finite"):
        perplexity(model, tokenizer, corpus="wikitext2", data=data)


def test_a_foreign_tokenizer_is_refused(model, tokenizer, data):
    model.resize_token_embeddings(50)
    with pytest.raises(CameraError, match="with its own tokenizer"):
        perplexity(model, tokenizer, corpus="wikitext2", data=data)
