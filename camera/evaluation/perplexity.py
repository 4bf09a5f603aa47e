"""Perplexity on WikiText-2, C4 or any local text, by the convention of GPTQ's evaluation.

Shapes: S tokens of the stream, B blocks of a batch, L tokens of a block, V vocabulary, C positions
of a chunk.
"""

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from camera.data import check_corpus, find_corpus, load_documents
from camera.errors import CameraError
from camera.progress import shown
from camera.windows import document_windows, ids_hash, join_documents, tokenize

KEY = "evaluation.perplexity"
DEFAULT_LENGTH = 2048
SEGMENTS, SEGMENTS_SEED = 256, 0  # GPTQ's C4: 256 segments, random.seed(0)
CHUNK_ELEMENTS = 2**26  # logits held in fp32 at once: 256 MiB


class Block(NamedTuple):
    """The stream's tokens [begin, end) are seen, the last `scored` of them are predicted."""

    begin: int
    end: int
    scored: int


def perplexity(
    model,
    tokenizer,
    *,
    corpus: str,
    data: str | Path,
    split: str | None = None,
    length: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity of a causal language model on a corpus.

    `stride = length` (the default) is GPTQ's convention: n = S // L blocks side by side, the rest
    dropped, `exp(Σ_block mean_nll · L / (n · L))` where mean_nll is over the L - 1 tokens that the
    block predicts. As every block predicts as many, that is exp of the mean nll over all n·(L - 1)
    predicted tokens. `stride < length` slides the window by `stride` and scores only the tokens new
    to it, up to the end of the text, as the transformers documentation does; the perplexity is
    again exp of the mean nll over the scored tokens.

    WikiText-2 is its test split joined by blank lines. C4 is 256 random segments of documents
    longer than L, drawn as GPTQ draws them (seed 0) and laid end to end; where fewer documents are
    long enough, it is the documents in their order, joined with EOS, at most 256 blocks, and
    `stream` says so. `length` defaults to min(2048, context of the model); `limit`
    (evaluation.blocks in the configuration) keeps the first blocks. The loss is fp32 whatever the
    model's dtype.

    Returns perplexity, nll_per_token, tokens (scored), blocks, length, stride, corpus, split,
    stream, documents, data_hash (sha256 of the stream's token ids that were read), seconds.
    Raises CameraError for an impossible length, stride, limit or batch_size, too little text, and
    logits that aren't finite.
    """
    _at_least_one("evaluation.batch_size", batch_size)
    passage = read_passage(
        model,
        tokenizer,
        corpus=corpus,
        data=data,
        split=split,
        length=length,
        stride=stride,
        limit=limit,
    )
    started = time.perf_counter()
    nll = _total_nll(model, passage, batch_size, progress)
    return passage.result(nll, time.perf_counter() - started)


@dataclass(frozen=True)
class Passage:
    """The blocks of a corpus whose tokens are to be predicted, and how they came about."""

    corpus: str
    split: str
    how: str
    documents: int
    length: int
    stride: int
    ids_S: Tensor
    blocks: list[Block]

    @property
    def title(self) -> str:
        return f"{self.corpus} perplexity"

    def requests(self) -> list[tuple[list[int], list[int]]]:
        """Of each block the tokens that are only seen, and those that are predicted after them."""
        ids = self.ids_S.tolist()
        return [
            (ids[b.begin : b.end - b.scored], ids[b.end - b.scored : b.end]) for b in self.blocks
        ]

    def finite(self, nll: float, first: Block) -> float:
        """The nll of a batch that starts with a block; CameraError if it is NaN or inf."""
        if math.isfinite(nll):
            return nll
        raise CameraError(
            f"{self.title}: the logits of the block at token {first.begin} are not finite (NaN or "
            f"inf); the checkpoint is damaged or its dtype overflows, so load it in float32 or "
            f"compress it again"
        )

    def result(self, nll: float, seconds: float) -> dict[str, Any]:
        """What `perplexity` returns, from the nll of all predicted tokens."""
        tokens = sum(block.scored for block in self.blocks)
        mean = nll / tokens
        return {
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "nll_per_token": mean,
            "tokens": tokens,
            "blocks": len(self.blocks),
            "length": self.length,
            "stride": self.stride,
            "corpus": self.corpus,
            "split": self.split,
            "stream": self.how,
            "documents": self.documents,
            "data_hash": ids_hash(self.ids_S[: self.blocks[-1].end]),
            "seconds": seconds,
        }


def read_passage(
    model,
    tokenizer,
    *,
    corpus: str,
    data: str | Path,
    split: str | None = None,
    length: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
) -> Passage:
    """The passage that `perplexity` measures; of the model only config and vocabulary are used.

    Raises CameraError for an impossible length, stride or limit, too little text, and a tokenizer
    of another model.
    """
    split = split or find_corpus(corpus, key=KEY).evaluated
    check_corpus(data, corpus, split, key=KEY)
    length, stride = _sizes(model, length, stride)
    if limit is not None:
        _at_least_one("evaluation.blocks", limit)
    ids_S, documents, how = _stream(tokenizer, corpus, data, split, length)
    blocks = list(_blocks(len(ids_S), length, stride))[:limit]
    if not blocks:
        raise CameraError(
            f"evaluation.length={length}: {corpus} ({split}) has only {len(ids_S)} tokens, less "
            f"than one block; lower the length"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if (largest := int(ids_S.max())) >= vocabulary:
        raise CameraError(
            f"the tokenizer gives the token {largest} and the model embeds only {vocabulary}; "
            f"evaluate the model with its own tokenizer"
        )
    return Passage(corpus, split, how, documents, length, stride, ids_S, blocks)


def context_length(model) -> int | None:
    """The longest context that the model's config declares, or None if it declares none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _sizes(model, length: int | None, stride: int | None) -> tuple[int, int]:
    context = context_length(model)
    length = min(DEFAULT_LENGTH, context or DEFAULT_LENGTH) if length is None else length
    if length < 2 or (context is not None and length > context):
        raise CameraError(
            f"evaluation.length={length}: a block must hold 2 tokens or more and no more than the "
            f"model's context ({context or 'not declared'})"
        )
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise CameraError(
            f"evaluation.stride={stride}: give a number from 1 to the length, {length}"
        )
    return length, stride


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CameraError(f"{name}={value}: give a whole number of at least 1")


def _stream(
    tokenizer, corpus: str, data: str | Path, split: str, length: int
) -> tuple[Tensor, int, str]:
    """The tokens that are read, how many documents they are of, and how they were put together."""
    documents = load_documents(data, corpus, split, key=KEY)
    separator = find_corpus(corpus, key=KEY).separator
    if separator is not None:
        return tokenize(tokenizer, separator.join(documents)), len(documents), "joined text"
    rng = random.Random(SEGMENTS_SEED)
    windows = document_windows(tokenizer, documents, SEGMENTS, length, rng)
    if windows is not None:
        how = f"{SEGMENTS} random segments of long documents"
        return windows.ids_NL.flatten(), windows.documents, how
    enough = SEGMENTS * length
    ids_S, used, how = join_documents(
        tokenizer, documents, order=range(len(documents)), enough=enough
    )
    how += f", as fewer than {SEGMENTS} exceed {length} tokens: not comparable with published C4"
    return ids_S[:enough], used, how


def _blocks(size: int, length: int, stride: int) -> Iterator[Block]:
    if stride == length:
        for begin in range(0, size - length + 1, length):
            yield Block(begin, begin + length, length - 1)
        return
    if size < length:
        return
    seen = 1  # the stream's first token is never predicted
    for begin in range(0, size, stride):
        end = min(begin + length, size)
        yield Block(begin, end, end - seen)
        seen = end
        if end == size:
            return


def _total_nll(model, passage: Passage, batch_size: int, progress: bool) -> float:
    """Σ nll of every scored token, summed in fp64."""
    total, blocks, ids_S = 0.0, passage.blocks, passage.ids_S
    with (
        _evaluating(model) as device,
        shown(passage.title, len(blocks), "blocks", show=progress) as advance,
    ):
        for batch in _batches(blocks, batch_size):
            ids_BL = torch.stack([ids_S[block.begin : block.end] for block in batch]).to(device)
            logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
            nll = _scored_nll(logits_BLV, ids_BL, [block.scored for block in batch])
            total += passage.finite(nll, batch[0])
            advance(len(batch))
    return total


def _batches(blocks: list[Block], batch_size: int) -> Iterator[list[Block]]:
    """Batches of equal blocks, so that nothing is padded: only a stream's last can be shorter."""
    batch: list[Block] = []
    for block in blocks:
        same = not batch or block.end - block.begin == batch[0].end - batch[0].begin
        if batch and (len(batch) == batch_size or not same):
            yield batch
            batch = []
        batch.append(block)
    if batch:
        yield batch


def _scored_nll(logits_BLV: Tensor, ids_BL: Tensor, scored: list[int]) -> float:
    """Σ -log p over the last `scored` tokens of each row, in fp32 by chunks of positions."""
    B, L, V = logits_BLV.shape
    chunk = max(1, CHUNK_ELEMENTS // (B * V))
    counts_B = torch.tensor(scored, device=ids_BL.device)
    first_B1 = (L - counts_B).unsqueeze(1)
    total = torch.zeros((), dtype=torch.float64)
    for begin in range(0, L - 1, chunk):
        end = min(begin + chunk, L - 1)
        targets_BC = ids_BL[:, begin + 1 : end + 1].to(logits_BLV.device)
        logits_BCV = logits_BLV[:, begin:end].float()
        # flat, not [B, V, C]: on a CPU a class axis with a stride takes six times as long
        flat_nll = cross_entropy(logits_BCV.flatten(0, 1), targets_BC.flatten(), reduction="none")
        nll_BC = flat_nll.view_as(targets_BC)
        position_C = torch.arange(begin + 1, end + 1, device=first_B1.device)
        is_scored_BC = (position_C >= first_B1).to(nll_BC.device)
        total += nll_BC.masked_fill(~is_scored_BC, 0.0).cpu().sum(dtype=torch.float64)
    return total.item()


@contextmanager
def _evaluating(model) -> Iterator[torch.device]:
    """Inference mode in eval state, restored afterwards; gives the device that inputs go to."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield model.get_input_embeddings().weight.device
    finally:
        model.train(was_training)
