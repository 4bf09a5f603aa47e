"""From text to windows of tokens: the sampling conventions that calibration and perplexity share.

Shapes: S tokens of a stream, N windows, L tokens of a window.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from camera.runtime.errors import CameraError


@dataclass(frozen=True)
class Windows:
    """Windows, how many documents and tokens they were drawn from, and how."""

    ids_NL: Tensor
    documents: int
    tokens: int
    how: str


def tokenize(tokenizer, text: str, *, special: bool = True) -> Tensor:
    """ids_S (int64) of the whole text, never truncated; `special` adds the tokenizer's BOS."""
    # truncation=False: a tokenizer.json can carry a truncation of its own.
    encoded = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def require_own_tokens(largest: int, vocabulary: int) -> None:
    """CameraError for a token that the model has no embedding of: on a GPU an assert of the
    device's."""
    if largest >= vocabulary:
        raise CameraError(
            f"the tokenizer gives the token {largest} and the model embeds only {vocabulary}; "
            f"use the model with its own tokenizer"
        )


def stream_windows(ids_S: Tensor, samples: int, length: int, rng: random.Random) -> Tensor | None:
    """ids_NL at starts randint(0, S - L - 1), as GPTQ's get_wikitext2; None if S ≤ L."""
    if len(ids_S) <= length:
        return None
    starts = [rng.randint(0, len(ids_S) - length - 1) for _ in range(samples)]
    return torch.stack([ids_S[start : start + length] for start in starts])


def document_windows(
    tokenizer, documents: Sequence[str], samples: int, length: int, rng: random.Random
) -> Windows | None:
    """One random window of each of `samples` random documents longer than L tokens, as GPTQ's
    get_c4.

    Documents are drawn with replacement and rejected until one is long enough; the draws are those
    of the reference (which crashes at a document of exactly L tokens; here it counts as too short).
    None where the corpus has fewer long documents than windows are asked for: the draws would
    repeat the same few.
    """
    known: dict[int, Tensor | None] = {}

    def long_enough(index: int) -> Tensor | None:
        if index not in known:
            text = documents[index]
            # A token is at least a byte, so most short documents need no tokenizer; +2 for BOS and
            # EOS.
            fits = len(text.encode()) + 2 > length
            ids_S = tokenize(tokenizer, text) if fits else None
            known[index] = ids_S if ids_S is not None and len(ids_S) > length else None
        return known[index]

    enough = 0
    for index in range(len(documents)):
        enough += long_enough(index) is not None
        if enough == samples:
            break
    else:
        return None

    windows, drawn = [], {}
    for _ in range(samples):
        ids_S = None
        while ids_S is None:
            index = rng.randint(0, len(documents) - 1)
            ids_S = long_enough(index)
        drawn[index] = len(ids_S)
        start = rng.randint(0, len(ids_S) - length - 1)
        windows.append(ids_S[start : start + length])
    return Windows(torch.stack(windows), len(drawn), sum(drawn.values()), "random long documents")


def join_documents(
    tokenizer, documents: Sequence[str], *, order: Sequence[int], enough: int | None = None
) -> tuple[Tensor, int, str]:
    """ids_S of documents each ended by EOS until `enough` tokens, their number, and how."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces, tokens = [], 0
    for index in order:
        piece = tokenize(tokenizer, documents[index], special=False)
        pieces += [piece, torch.tensor(end, dtype=torch.int64)]
        tokens += len(piece) + len(end)
        if enough is not None and tokens >= enough:
            break
    how = "documents joined with EOS" if end else "documents joined without a separator (no EOS)"
    return torch.cat(pieces), len(pieces) // 2, how


def ids_hash(ids: Tensor) -> str:
    """sha256 of token ids as little-endian int64, in order."""
    return hashlib.sha256(
        ids.to(torch.int64).contiguous().cpu().numpy().astype("<i8").tobytes()
    ).hexdigest()
