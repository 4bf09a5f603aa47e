"""Perplexity of a loaded model, by the convention of GPTQ's evaluation.

Shapes: B blocks of a batch, L tokens of a block, V vocabulary, C positions of a chunk.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from camera.evaluation.divergence.meter import DivergenceMeter, TokenObserver
from camera.evaluation.divergence.reference import DenseReference, require_reference
from camera.evaluation.passages import Block, Passage, at_least_one, read_passage
from camera.runtime.progress import progress_bar
from camera.streaming.lm_head import tokens_per_chunk


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
    reference: DenseReference | None = None,
    top: int | None = None,
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

    Returns perplexity, nll_per_token, nll_stderr (its standard error over the blocks as
    independent draws, `passages.standard_error`; None for one block), nll_per_block (mean over the
    tokens of each: two models differ by less than nll_stderr says, as they see the same blocks),
    tokens (scored), blocks, length, stride, corpus, split,
    stream, documents, data_hash (sha256 of the stream's token ids that were read), seconds. With
    `top` (evaluation.divergence) also divergence, the comparison with the dense model of
    `reference` by its `top` likeliest tokens: see `DivergenceMeter.result`.
    Raises CameraError for an impossible length, stride, limit or batch_size, too little text, and
    logits that aren't finite.
    """
    at_least_one("evaluation.perplexity_batch_size", batch_size)
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
    if top is None:
        started = time.perf_counter()
        nlls = _nll_of_blocks(model, passage, batch_size, progress, None)
        return passage.result(nlls, time.perf_counter() - started)
    (dense,) = require_reference(reference).of([passage], top)
    meter, started = DivergenceMeter(passage, dense), time.perf_counter()
    nlls = _nll_of_blocks(model, passage, batch_size, progress, meter)
    found = passage.result(nlls, time.perf_counter() - started)
    return found | {"divergence": meter.result()}


def _nll_of_blocks(
    model, passage: Passage, batch_size: int, progress: bool, observer: TokenObserver | None
) -> list[float]:
    """Σ nll of every block's scored tokens, summed in fp64; an observer sees their predictions."""
    nlls, blocks, ids_S, seen = [], passage.blocks, passage.ids_S, 0
    with (
        _evaluating(model) as device,
        progress_bar(passage.title, len(blocks), "blocks", show=progress) as advance,
    ):
        for batch in _batches(blocks, batch_size):
            ids_BL = torch.stack([ids_S[block.begin : block.end] for block in batch]).to(device)
            logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
            scored = [block.scored for block in batch]
            found = _scored_nll(logits_BLV, ids_BL, scored)
            if observer is not None:
                _show(observer, logits_BLV, scored, seen)
            seen += sum(scored)
            nlls += [passage.finite(n, block) for n, block in zip(found, batch, strict=True)]
            advance(len(batch))
    return nlls


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


def _scored_nll(logits_BLV: Tensor, ids_BL: Tensor, scored: list[int]) -> list[float]:
    """Of each row Σ -log p over the last `scored` tokens, in fp32 by chunks of positions."""
    B, L, V = logits_BLV.shape
    chunk = max(1, tokens_per_chunk(V, tables=2) // B)
    counts_B = torch.tensor(scored, device=ids_BL.device)
    first_B1 = (L - counts_B).unsqueeze(1)
    total_B = torch.zeros(B, dtype=torch.float64)
    for begin in range(0, L - 1, chunk):
        end = min(begin + chunk, L - 1)
        targets_BC = ids_BL[:, begin + 1 : end + 1].to(logits_BLV.device)
        logits_BCV = logits_BLV[:, begin:end].float()
        # flat, not [B, V, C]: on a CPU a class axis with a stride takes six times as long
        flat_nll = cross_entropy(logits_BCV.flatten(0, 1), targets_BC.flatten(), reduction="none")
        nll_BC = flat_nll.view_as(targets_BC)
        position_C = torch.arange(begin + 1, end + 1, device=first_B1.device)
        is_scored_BC = (position_C >= first_B1).to(nll_BC.device)
        total_B += nll_BC.masked_fill(~is_scored_BC, 0.0).cpu().sum(1, dtype=torch.float64)
    return total_B.tolist()


def _show(observer: TokenObserver, logits_BLV: Tensor, scored: list[int], seen: int) -> None:
    """Tell an observer how the last `scored` tokens of each row are predicted, by chunks; `seen`
    tokens of the passage came before."""
    L, chunk = logits_BLV.shape[1], tokens_per_chunk(logits_BLV.shape[2])
    for logits_LV, count in zip(logits_BLV, scored, strict=True):
        first = L - 1 - count  # the position that predicts the first scored token
        for begin in range(0, count, chunk):
            end = min(begin + chunk, count)
            log_AV = logits_LV[first + begin : first + end].log_softmax(-1, torch.float32)
            observer.observe(torch.arange(seen + begin, seen + end), log_AV)
        seen += count


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
