"""Calibration tokens: which windows of which text the statistics are gathered on.

Shapes: S tokens of a stream, N windows, L tokens of a window.
"""

import logging
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camera.calibration.corpora import find_corpus, load_documents
from camera.calibration.settings import (
    KEY,
    SELF_SAMPLED,
    Calibration,
    check_calibration,
    deal,
    part_of,
    shares_of,
    source_name,
)
from camera.calibration.windows import (
    Windows,
    document_windows,
    ids_hash,
    join_documents,
    require_own_tokens,
    stream_windows,
    tokenize,
)
from camera.runtime.errors import CameraError

# Where documents are joined for lack of long ones: enough of them that random windows seldom
# overlap.
JOINED_SURPLUS = 4
MOSTLY = 0.5  # a larger share of unknown tokens is worth a word
log = logging.getLogger("camera")


@dataclass(frozen=True)
class CalibrationTokens:
    """The tokens (int64), the sha256 of their ids, and where they came from.

    Of a mixture also the names of its sources, and which of them each window is `dealt` from.
    """

    ids_NL: Tensor
    hash: str
    description: dict[str, Any]
    sources: tuple[str, ...] = ()
    dealt: tuple[int, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Source, split, samples, length, seed, documents, tokens available, how drawn, hash."""
        return dict(self.description)


def calibration_tokens(
    tokenizer,
    calibration: Calibration,
    *,
    data: str | Path,
    seed: int,
    max_length: int | None = None,
    vocabulary: int | None = None,
    write: Callable[[int, int], Tensor] | None = None,
) -> CalibrationTokens:
    """The calibration windows of a source, the same for the same seed, tokenizer and data.

    WikiText-2 (and a text file): the split joined by blank lines, tokenised once, N windows at
    `start = randint(0, S - L - 1)`: GPTQ's get_wikitext2, which CAMERA follows. C4 (and a jsonl
    file): a random window of N random documents longer than L (GPTQ's get_c4); where fewer than N
    are long enough, documents in random order are joined with EOS and cut like WikiText, and
    `describe()["how"]` says so. `max_length` (the model's context) caps L;
    `vocabulary` is how many tokens the model embeds.
    `write(N, L)` gives windows that the model itself writes, for the source ebss.
    A mixture deals each source's windows out in turn (`deal`).

    Raises CameraError for values that can't be, a source that can't be read, too little text, and
    a tokenizer of another model.
    """
    check_calibration(calibration, data=data)
    if max_length is not None and max_length < 2:
        raise CameraError(
            f"max_length={max_length}: the model's context must hold 2 tokens or more"
        )
    capped = replace(calibration, length=min(calibration.length, max_length or calibration.length))
    shares = shares_of(capped.source, capped.sources)
    dealt = deal(list(shares.values()), capped.samples)
    windows = _mixed(tokenizer, capped, list(shares), dealt, data, seed, write)
    if vocabulary is not None:
        require_own_tokens(int(windows.ids_NL.max()), vocabulary)
    _warn_of_unknown(tokenizer, windows.ids_NL, calibration.source)
    digest = ids_hash(windows.ids_NL)
    description = {
        "source": source_name(asdict(calibration)),
        "split": calibration.split,
        "samples": capped.samples,
        "length": capped.length,
        "length_asked": calibration.length,
        "seed": seed,
        "documents": windows.documents,
        "tokens_available": windows.tokens,
        "how": windows.how,
        "hash": digest,
    }
    if len(shares) == 1:
        return CalibrationTokens(windows.ids_NL, digest, description)
    return CalibrationTokens(windows.ids_NL, digest, description, tuple(shares), tuple(dealt))


def _warn_of_unknown(tokenizer, ids_NL: Tensor, source: str) -> None:
    """A vocabulary that lacks most of a text makes statistics of one and the same token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = 0.0 if unknown is None else (ids_NL == unknown).double().mean().item()
    if share > MOSTLY:
        log.warning(
            "%.0f %% of the calibration tokens of %s are unknown to the tokenizer: is it the "
            "model's own?",
            100 * share,
            source,
        )


def _mixed(
    tokenizer,
    calibration: Calibration,
    names: list[str],
    dealt: list[int],
    data: str | Path,
    seed: int,
    write: Callable[[int, int], Tensor] | None,
) -> Windows:
    """The windows of every source, in the order in which they are dealt."""
    parts = [part_of(calibration, name, dealt.count(i)) for i, name in enumerate(names)]
    drawn = [
        _written(part, write)
        if part.source == SELF_SAMPLED
        else _windows(tokenizer, part, data, seed)
        for part in parts
    ]
    if len(drawn) == 1:
        return drawn[0]
    ids_NL = torch.empty(calibration.samples, calibration.length, dtype=torch.int64)
    for i, windows in enumerate(drawn):
        ids_NL[torch.tensor(dealt) == i] = windows.ids_NL
    how = "; ".join(f"{p.source}: {w.how}" for p, w in zip(parts, drawn, strict=True))
    return Windows(ids_NL, sum(w.documents for w in drawn), sum(w.tokens for w in drawn), how)


def _written(calibration: Calibration, write: Callable[[int, int], Tensor] | None) -> Windows:
    """The windows that the model itself writes."""
    if write is None:
        raise CameraError(f"{KEY}={SELF_SAMPLED} is written by the model that is compressed alone")
    ids_NL = write(calibration.samples, calibration.length)
    return Windows(ids_NL, len(ids_NL), ids_NL.numel(), "written by the model, experts balanced")


def _windows(tokenizer, calibration: Calibration, data: str | Path, seed: int) -> Windows:
    """The windows of one corpus or file."""
    source, samples, length = calibration.source, calibration.samples, calibration.length
    documents = load_documents(data, source, calibration.split, key=KEY)
    separator = find_corpus(source, key=KEY).separator
    rng = random.Random(seed)
    if separator is not None:
        ids_S = tokenize(tokenizer, separator.join(documents))
        used, how = len(documents), "random windows of the joined text"
    else:
        windows = document_windows(tokenizer, documents, samples, length, rng)
        if windows is not None:
            return windows
        order = rng.sample(range(len(documents)), len(documents))
        ids_S, used, joined = join_documents(
            tokenizer, documents, order=order, enough=JOINED_SURPLUS * samples * length
        )
        how = f"random windows of {joined}, as fewer than {samples} exceed {length} tokens"
    ids_NL = stream_windows(ids_S, samples, length, rng)
    if ids_NL is None:
        raise CameraError(
            f"calibration.length={length}: {source} has only {len(ids_S)} tokens to draw "
            f"calibration.samples={samples} windows from, and a window needs more tokens than its "
            f"length; lower calibration.length or give more text"
        )
    return Windows(ids_NL, used, len(ids_S), how)
