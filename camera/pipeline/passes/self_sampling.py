"""Calibration text that the model writes itself, balanced over its experts (EBSS).

Source: MoEQuant (arXiv 2505.03804), expert-balanced self-sampling; its generator isn't public.

Shapes: N samples, L tokens of a sample, B beams of all samples, V vocabulary, E routed experts of a
layer, K experts per token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from camera.checkpoint.loading import load_model
from camera.checkpoint.source import fingerprint
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.runtime import distributed
from camera.runtime.device.accelerator import free_memory
from camera.runtime.errors import CameraError
from camera.runtime.files import content_key, partial_of, replace_durably
from camera.runtime.progress import format_bytes

if TYPE_CHECKING:
    from camera.streaming.skeleton import MetaModel

BEAMS, TAU = 4, 1.2  # the paper's w and τ
TOGETHER = 16  # samples that are written at once
VERSION = 1  # of this text: raise it where the same seed gives another
log = logging.getLogger("camera")


def self_sampled(
    meta: MetaModel,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    cache: Path | None,
    trust_remote_code: bool,
) -> torch.Tensor:
    """ids_NL that the model behind `meta` writes; from `cache`, a folder, if it wrote them before.

    The whole model is loaded for it. CameraError where that doesn't fit or has no experts, and
    where several processes would each write their own.
    """
    from safetensors.torch import load_file, save_file

    about = {"weights": fingerprint(meta.folder), "samples": samples, "length": length}
    about |= {"seed": seed, "dtype": str(meta.dtype), "device": meta.device.type}
    about |= {"torch": torch.__version__, "version": VERSION}
    path = cache and cache / f"{meta.config.model_type}-ebss-{content_key(about)}.safetensors"
    if path is not None and path.is_file():
        return load_file(path)["ids"]
    _refuse(meta)
    log.info("the model writes %d × %d tokens of calibration text", samples, length)
    model = load_model(
        meta.folder, str(meta.device), str(meta.dtype).removeprefix("torch."), trust_remote_code
    )
    special = sorted({*tokenizer.all_special_ids})
    ids_NL = balanced_text(model, samples, length, seed, len(tokenizer), special)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids_NL}, partial_of(path))
        replace_durably(partial_of(path), path)
    return ids_NL


def _refuse(meta: MetaModel) -> None:
    key = "calibration.source=ebss"
    if not any(any(pool.routed) for pool in meta.budget.layers.values()):
        raise CameraError(f"{key} balances routed experts, and this model has none: use c4.")
    if distributed.world() > 1:
        raise CameraError(f"{key} is written by one process: start it without torchrun.")
    needed, free = meta.budget.dense.model * meta.dtype.itemsize, free_memory(meta.device)
    if needed > 0.9 * free:
        raise CameraError(
            f"{key} is written by the whole model in memory, {format_bytes(needed)} where "
            f"{format_bytes(free)} are free: for a model that is streamed layer by layer use "
            "another source."
        )


@torch.no_grad()
def balanced_text(
    model: Any, samples: int, length: int, seed: int, vocabulary: int, special: list[int]
) -> torch.Tensor:
    """ids_NL of a beam search from a random first token each, on the CPU.

    Of the beams S and their next tokens v the `BEAMS` lowest stay by

        -(R_S + log P(v | S)) / (|S| + 1) + σ(S) / τ

    R_S is the sum of log probabilities of S after its first token; σ(S) the standard deviation
    (E - 1) of the shares of S's tokens that go to each expert, its mean over the layers; v isn't
    counted, so that no candidate is run. `special` tokens are never written.
    """
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([v for v in range(vocabulary) if v not in {*special}])
    first_N = allowed[torch.randint(len(allowed), (samples,), generator=generator)]
    parts = [_beams(model, first, length, allowed) for first in first_N.split(TOGETHER)]
    return torch.cat(parts)


def _beams(model: Any, first_N: torch.Tensor, length: int, allowed: torch.Tensor) -> torch.Tensor:
    """ids_NL after these first tokens."""
    device, samples = model.device, len(first_N)
    ids_BL = first_N.to(device).repeat_interleave(BEAMS)[:, None]
    # at first all beams of a sample are one
    logp_B = torch.full((samples, BEAMS), -torch.inf, device=device)
    logp_B[:, 0] = 0.0
    logp_B, order_B, cache = logp_B.flatten(), torch.arange(len(ids_BL), device=device), None
    barred_V = torch.ones(model.get_input_embeddings().num_embeddings, dtype=torch.bool)
    barred_V[allowed] = False
    with _counted(model) as counts:
        while ids_BL.shape[1] < length:
            if cache is not None:
                cache.reorder_cache(order_B)
            out = model(ids_BL[:, -1:], past_key_values=cache, use_cache=True)
            cache, spread_B = out.past_key_values, _spread(counts)
            logp_BV = out.logits[:, -1].float().log_softmax(-1)
            logp_BV = logp_BV.masked_fill(barred_V.to(device), -torch.inf) + logp_B[:, None]
            score_BV = -logp_BV / (ids_BL.shape[1] + 1) + spread_B[:, None] / TAU
            chosen = score_BV.view(samples, -1).topk(BEAMS, largest=False, sorted=True).indices
            beam, token = chosen // logp_BV.shape[1], chosen % logp_BV.shape[1]
            starts = torch.arange(0, len(ids_BL), BEAMS, device=device)[:, None]
            order_B = (starts + beam).flatten()
            logp_B = logp_BV[order_B, token.flatten()]
            ids_BL = torch.cat((ids_BL[order_B], token.flatten()[:, None]), 1)
            for layer in counts:
                counts[layer] = counts[layer][order_B]
    return ids_BL[::BEAMS].cpu()  # the lowest stands first


def _spread(counts: dict[int, torch.Tensor]) -> torch.Tensor:
    """σ of every beam from the tokens of each expert by layer, [B, E]."""
    shares = [count_BE / count_BE.sum(1, keepdim=True) for count_BE in counts.values()]
    return torch.stack([share_BE.std(1) for share_BE in shares]).mean(0)


@contextmanager
def _counted(model: Any) -> Iterator[dict[int, torch.Tensor]]:
    """By layer how many tokens of each beam went to each expert, fp32 [B, E], while it runs."""
    family, counts, hooks = family_of(model.config.model_type), {}, []
    for index, layer in enumerate(model.base_model.layers):
        routed = FeedForward(layer, family, str(index)).routed
        if routed is not None:
            experts = len(routed.widths)

            def count(_: Any, given: tuple, named: dict, i: int = index, e: int = experts) -> None:
                index_BK = (*given, *named.values())[1]
                new_BE = torch.zeros(len(index_BK), e, device=index_BK.device)
                new_BE.scatter_(1, index_BK, 1.0)
                counts[i] = counts[i] + new_BE if i in counts else new_BE

            hooks.append(routed.module.register_forward_pre_hook(count, with_kwargs=True))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
