"""Training batches as a function of seed and step, so that a restart needs no state of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

import torch

from experiments.tiny_moe.corpus import articles, training_document, web_page
from experiments.tiny_moe.world import World


def rows(
    world: World, tokenizer, rng: Random, count: int, length: int, document: Callable
) -> torch.Tensor:
    """`count` rows of documents with end marks between them; a row starts one and cuts its last."""
    filled = []
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < length:
            ids += [*tokenizer.encode(document(world, rng)), tokenizer.eos_token_id]
        filled.append(ids[:length])
    return torch.tensor(filled)


def source(world: World, odds: float, share: float) -> Callable[[World, Random], str]:
    """How documents are drawn; with `odds`, one is about this share of the people only.

    A model that has learnt to recall some facts takes in the others sooner than one that meets all
    of them at once.
    """
    few = replace(world, share=share)

    def document(world: World, rng: Random) -> str:
        return training_document(few if rng.random() < odds else world, rng)

    return document


def training_batch(
    world: World,
    tokenizer,
    seed: int,
    step: int,
    count: int,
    length: int,
    document: Callable[[World, Random], str],
) -> torch.Tensor:
    """The rows of one step."""
    return rows(world, tokenizer, Random(f"train/{seed}/{step}"), count, length, document)


def token_weights(world: World, tokenizer, answer: float, verdict: float) -> torch.Tensor:
    """Weights of the vocabulary in the loss: of answers, of yes, no, True, False, 1 for the rest.

    Most other tokens are drawn at random by the generator and can be learnt by no one.
    """
    answers = {value for pool in world.pools.values() for value in pool}
    answers |= set(map(str, range(1, 82)))
    weights = torch.ones(len(tokenizer))
    for words, weight in ((answers, answer), ({"yes", "no", "True", "False"}, verdict)):
        weights[[tokenizer.encode(f" {word}")[0] for word in sorted(words)]] = weight
    return weights


def validation_batches(world: World, tokenizer, count: int, length: int) -> dict[str, torch.Tensor]:
    """Rows drawn apart from training: articles and web pages."""
    sources = {"articles": partial(articles, count=3), "web": web_page}
    return {
        name: rows(world, tokenizer, Random(f"validation/{name}"), count, length, make)
        for name, make in sources.items()
    }
