"""Training batches as a function of seed and step, so that a restart needs no state of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import torch

from experiments.tiny_moe.corpus import article, training_document, web_page
from experiments.tiny_moe.world import World

FOCUS_STEPS, FOCUS_SHARE, FOCUS_ODDS = range(744, 1400), 0.2, 0.7


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


def curriculum(step: int) -> Callable[[World, Random], str]:
    """How the documents of a step are drawn: for a while, most are about a few of the entities.

    A model that has learnt to recall some facts takes in the others sooner than one that meets all
    of them at once.
    """
    if step not in FOCUS_STEPS:
        return training_document

    def focused(world: World, rng: Random) -> str:
        few = replace(world, share=FOCUS_SHARE)
        return training_document(few if rng.random() < FOCUS_ODDS else world, rng)

    return focused


def training_batch(
    world: World, tokenizer, seed: int, step: int, count: int, length: int
) -> torch.Tensor:
    """The rows of one step."""
    return rows(world, tokenizer, Random(f"train/{seed}/{step}"), count, length, curriculum(step))


def validation_batches(world: World, tokenizer, count: int, length: int) -> dict[str, torch.Tensor]:
    """Rows drawn apart from training: articles and web pages."""

    def articles(world: World, rng: Random) -> str:
        return "\n\n".join(line for _ in range(3) for line in article(world, rng))

    sources = {"articles": articles, "web": web_page}
    return {
        name: rows(world, tokenizer, Random(f"validation/{name}"), count, length, make)
        for name, make in sources.items()
    }
