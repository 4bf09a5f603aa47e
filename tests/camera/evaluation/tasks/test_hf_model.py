"""Packed log-likelihoods equal lm-eval's own, on every family."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from camera.evaluation.streamed import StreamedEvaluation
from camera.evaluation.tasks.hf_model import PackedLM
from camera.evaluation.tasks.streamed_model import StreamedLM
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.models import FAMILIES, build_model, build_tokenizer


def requests(questions=5, longest=40, seed=0):
    """Questions of one to four answers of different lengths, one answer and one context shared."""
    rng = random.Random(seed)

    def tokens(n):
        return [rng.randint(3, 250) for _ in range(n)]

    found = []
    for _ in range(questions):
        context = tokens(rng.randint(1, longest))
        for _ in range(rng.randint(1, 4)):
            found.append((("", ""), context, tokens(rng.randint(1, 7))))
    found.append((("", ""), found[0][1], found[0][2]))
    rng.shuffle(found)
    return found


def both(model, asked, **options):
    wrap = dict(tokenizer=build_tokenizer(), softmax_dtype="float32", **options)
    packed = PackedLM(pretrained=model, **wrap)._loglikelihood_tokens(asked, disable_tqdm=True)
    alone = HFLM(pretrained=model, **wrap)._loglikelihood_tokens(asked, disable_tqdm=True)
    return packed, alone


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_likelihoods_equal_lm_evals(family, batch_size):
    packed, alone = both(build_model(family), requests(), batch_size=batch_size)
    for (got, greedy), (expected, expected_greedy) in zip(packed, alone, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_what_exceeds_the_context_goes_lm_evals_way():
    model = build_model("llama")
    asked = [*requests(longest=40), (("", ""), list(range(3, 143)), [5, 6])]
    packed, alone = both(model, asked, batch_size=4, max_length=32)
    assert packed == [pytest.approx(answer, abs=1e-4) for answer in alone]


def test_a_context_is_read_once():
    model = build_model("llama")
    read = []
    hook = model.model.embed_tokens.register_forward_hook(lambda m, a, out: read.append(a[0]))
    context = list(range(3, 103))
    asked = [(("", ""), context, [7 + i, 8, 9]) for i in range(4)]
    lm = PackedLM(pretrained=model, tokenizer=build_tokenizer(), batch_size=16)
    lm._loglikelihood_tokens(asked, disable_tqdm=True)
    hook.remove()
    assert sum(ids.numel() for ids in read) == 100 + 4 * 2


def test_attention_that_takes_no_mask_of_ones_own_goes_lm_evals_way():
    model = build_model("llama")
    asked = requests()
    expected, _ = both(model, asked, batch_size=4)
    lm = PackedLM(pretrained=model, tokenizer=build_tokenizer(), batch_size=4)
    lm.model.config._attn_implementation = "flash_attention_2"
    assert lm._packs(asked) == ([], list(range(len(asked))))
    lm.model.config._attn_implementation = "sdpa"
    assert len(expected) == len(asked)


def test_padding_leaves_no_trace_in_a_batch():
    model = build_model("qwen2_moe")
    with torch.no_grad():
        one, _ = both(model, requests(seed=3), batch_size=1)
        many, _ = both(model, requests(seed=3), batch_size=64)
    assert [a for a, _ in one] == [pytest.approx(b, abs=1e-4) for b, _ in many]


class Row:
    """What lm-eval asks of a row."""

    def __init__(self, context, answer):
        self.args, self.task_name, self.doc_id = (context, answer), "piqa", 7


def packed(model, tokenizer):
    return PackedLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


def streamed(model, tokenizer, folder):
    model.save_pretrained(folder)
    return StreamedLM(StreamedEvaluation(MetaModel(folder)), tokenizer, progress=False)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (("q", "long " * 30), r"row 7 of piqa has an answer of 150 tokens, .* context holds 128:"),
        (("   ", "a"), "row 7 of piqa has a blank question"),
        (("q", ""), "row 7 of piqa has no answer"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_row_that_cannot_be_asked_is_named(whole, row, told, tmp_path):
    model, tokenizer = build_model("llama"), build_tokenizer()
    lm = packed(model, tokenizer) if whole else streamed(model, tokenizer, tmp_path)
    with pytest.raises(CameraError, match=told):
        lm.loglikelihood([Row("q", "fine"), Row(*row)], disable_tqdm=True)


@pytest.mark.parametrize("whole", [True, False])
def test_tokens_that_the_model_does_not_embed_are_refused(whole, tmp_path):
    model, tokenizer = build_model("llama", vocab_size=60), build_tokenizer()
    lm = packed(model, tokenizer) if whole else streamed(model, tokenizer, tmp_path)
    with pytest.raises(CameraError, match="embeds only 60; use the model with its own tokenizer"):
        lm.loglikelihood([Row("question", "zebra")], disable_tqdm=True)
