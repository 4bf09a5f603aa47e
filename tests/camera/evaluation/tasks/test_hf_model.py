"""Packed log-likelihoods equal lm-eval's own, on every family."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from camera.evaluation.tasks.hf_model import PackedLM
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
