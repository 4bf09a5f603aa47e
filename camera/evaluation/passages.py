"""The passage of a corpus whose tokens a model is to predict, and its blocks.

Shapes: S tokens of the stream.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from camera.calibration.corpora import check_corpus, find_corpus, load_documents
from camera.calibration.windows import (
    document_windows,
    ids_hash,
    join_documents,
    require_own_tokens,
    tokenize,
)
from camera.runtime.errors import CameraError

KEY = "evaluation.perplexity"
DEFAULT_LENGTH = 2048
SEGMENTS, SEGMENTS_SEED = 256, 0  # GPTQ's C4: 256 segments, random.seed(0)


class Block(NamedTuple):
    """The stream's tokens [begin, end) are seen, the last `scored` of them are predicted."""

    begin: int
    end: int
    scored: int


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

    def result(self, nlls: list[float], seconds: float) -> dict[str, Any]:
        """What `perplexity` returns, from the nll of each block's predicted tokens."""
        scored = [block.scored for block in self.blocks]
        tokens = sum(scored)
        mean = sum(nlls) / tokens
        return {
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "nll_per_token": mean,
            "nll_stderr": standard_error(nlls, scored),
            "nll_per_block": [nll / count for nll, count in zip(nlls, scored, strict=True)],
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


def standard_error(nlls: list[float], scored: list[int]) -> float | None:
    """Of the mean nll over tokens, that of a ratio of sums over B blocks drawn independently.

    √(B / (B - 1) · Σ_b (nll_b - mean · tokens_b)²) / Σ_b tokens_b; None for a single block.
    """
    B, tokens = len(nlls), sum(scored)
    if B < 2:
        return None
    mean = sum(nlls) / tokens
    squares = sum((nll - mean * count) ** 2 for nll, count in zip(nlls, scored, strict=True))
    return math.sqrt(B / (B - 1) * squares) / tokens


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
        at_least_one("evaluation.blocks", limit)
    ids_S, documents, how = _stream(tokenizer, corpus, data, split, length)
    blocks = list(_blocks(len(ids_S), length, stride))[:limit]
    if not blocks:
        raise CameraError(
            f"evaluation.length={length}: {corpus} ({split}) has only {len(ids_S)} tokens, less "
            f"than one block; lower the length"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    require_own_tokens(int(ids_S.max()), vocabulary)
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


def at_least_one(name: str, value: int) -> None:
    """CameraError, with the setting's name, for anything but a positive whole number."""
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
