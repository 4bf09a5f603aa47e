"""Refit of the remaining output weights: to the unpruned layer's output, the dense model's hidden
states, or half way.

Shapes: T calibration tokens, H hidden, N tokens of one expert, W its kept width, R removed.
"""

from typing import Any

import torch
from torch.nn import functional as F

from camera.compensation.expert_regression import PIECE, ExpertRegression
from camera.compensation.least_squares import AT_ONCE, FitReport, fit_report, refit, refit_alone
from camera.compensation.settings import CompensationSettings
from camera.moe.feed_forward import FeedForward
from camera.moe.grouped.sinks import ExpertPhi, OutputSum
from camera.moe.pool import KeptRows
from camera.runtime import distributed
from camera.runtime.buffers import trim_heap

Weights = dict[tuple[str, int], torch.Tensor]
"""By module path and expert: down_HW before the layer was cut."""

Seen = dict[tuple[str, int], tuple[torch.Tensor | None, torch.Tensor]]
"""By module path and expert: tokens of the layer (None for all) and phi."""

TINY = 1e-3  # lower bound of a token's norm, relative to the mean


def output_weights(ffn: FeedForward) -> Weights:
    """The output weights of every expert, to be kept while the layer is cut."""
    return {
        (group.path, expert): group.down(expert).detach()
        for group in ffn.groups
        for expert in range(len(group.widths))
    }


def fit_bytes(
    tokens: int,
    hidden: int,
    widths: list[int],
    itemsize: int,
    dense: bool = False,
    kept: float = 1.0,
) -> int:
    """Peak bytes of a fit beside phi, in fp32: new and old weights, and the largest of

        - hidden states, residual, output, those of the dense model where it is aimed at; phi of the
          widest expert once more, as it is put together and as it is cut; and the systems that are
          solved then, or each expert's Gram matrix and its factor;
        - residual and output, the sums over tokens of all experts, and a piece of phi.

    `kept` is the share of the micro-experts that stays, at most.
    """
    states, widest = tokens * hidden, max(widths)
    together = int(kept * sum(widths))
    if len(widths) > 1:
        together = min(together, AT_ONCE)
    piece = min(PIECE, tokens)
    joining = 4 * ((4 + 2 * dense) * states + piece * widest) + itemsize * tokens * widest
    solving = 4 * max(2 * sum(w * w for w in widths), 4 * together**2)
    summing = 4 * (2 * states + together**2 + piece * (together + 4 * hidden))
    weights = 4 * 2 * hidden * (sum(widths) + 2 * together)
    return weights + max(joining + solving, summing)


@torch.no_grad()
def compensate(
    ffn: FeedForward,
    phi: list[tuple[int, list[ExpertPhi]]],
    kept: KeptRows,
    before: Weights,
    fitted: int,
    how: CompensationSettings,
    target_TH: torch.Tensor | None = None,
    stream_TH: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Refit the pruned layer `ffn` in place: its output y_TH on all tokens, and what the fit did.

    `phi` holds tokens and calls of every batch of the unpruned layer; the calls are emptied;
    tokens from `fitted` on are held out. What the layer is to put out is what it did; where the
    dense model is the target, `how.dense_share` of the way from there to `target_TH`. With
    `stream_TH`, the hidden states that its output is added to, errors count relative to the sum.
    Both, fp32, are used up.
    """
    tokens = sum(count for count, _ in phi)
    first = next(iter(before.values()))
    biases_TH = _of_biases(ffn, phi, tokens)
    seen = _by_expert(phi)
    trim_heap()  # the batches' pieces
    scale_T1 = None
    if stream_TH is not None:
        if biases_TH is not None:
            stream_TH.add_(biases_TH, alpha=ffn.residual_scale)
        scale_T1 = inverse_norms(_after(stream_TH, seen, before, ffn.residual_scale))
    if target_TH is None:
        residual_TH = torch.zeros(tokens, len(first), device=first.device)
    else:
        if biases_TH is not None:
            target_TH -= biases_TH
        residual_TH = target_TH.mul_(how.dense_share * (1.0 if scale_T1 is None else scale_T1))
    blocks: dict[tuple[str, int], ExpertRegression] = {}
    fits: list[FitReport] = []
    for place, down_HW in before.items():
        tokens_N, phi_NF = seen.pop(place) if place in seen else _no_tokens(down_HW)
        stays = torch.zeros(down_HW.shape[1], dtype=torch.bool)
        stays[kept[place[0]][place[1]]] = True
        stays = stays.to(down_HW.device)
        everywhere = scale_T1 is None or tokens_N is None
        scale_N1 = scale_T1 if everywhere else scale_T1[tokens_N]
        block = ExpertRegression(tokens_N, phi_NF[:, stays], down_HW[:, stays].T, scale_N1)
        gone_NH = _gone(block, phi_NF, down_HW, ~stays, how.dense_share)
        del phi_NF
        blocks[place] = block
        if how.scope == "expert":
            fits.append(refit_alone(block, gone_NH, fitted, how, place[0]))
        elif tokens_N is None:
            residual_TH += gone_NH
        else:
            residual_TH.index_copy_(0, tokens_N, residual_TH.index_select(0, tokens_N) + gone_NH)
    trim_heap()  # what was cut
    if how.scope == "layer":
        where = ", ".join(dict.fromkeys(path for path, _ in blocks))
        fits.append(refit(list(blocks.values()), residual_TH, fitted, how, where))
    output = OutputSum(first.new_zeros(1, tokens, len(first)))
    for group in ffn.groups:
        for expert in range(len(group.widths)):
            block = blocks[group.path, expert]
            group.down(expert).copy_(block.weight_WH.T)
            if len(block.phi_NW):
                output.add(block.tokens_N, F.linear(block.phi_NW, group.down(expert)))
    if biases_TH is not None:
        output.y_TH += biases_TH
    return output.y_TH, fit_report(fits)


def _gone(
    block: ExpertRegression,
    phi_NF: torch.Tensor,
    down_HF: torch.Tensor,
    gone_F: torch.Tensor,
    dense_share: float,
) -> torch.Tensor:
    """What one expert adds to the residual: what of it was removed, and, for the part of the target
    that is the dense model's, what its rest puts out already."""
    if dense_share == 1:
        return block.output().neg_()
    removed = phi_NF[:, gone_F], down_HF[:, gone_F].T
    removed_NH = ExpertRegression(block.tokens_N, *removed, block.scale_N1).output()
    if dense_share:
        removed_NH.mul_(1 - dense_share).sub_(block.output(), alpha=dense_share)
    return removed_NH


def _of_biases(
    ffn: FeedForward, phi: list[tuple[int, list[ExpertPhi]]], tokens: int
) -> torch.Tensor | None:
    """What the experts' biases add to the layer's output, [T, H]; None where none has one."""
    groups = {group.path: group for group in ffn.groups}
    biases = [group.down_bias(0) for group in ffn.groups]
    if all(bias_H is None for bias_H in biases):
        return None
    hidden, device = len(ffn.groups[0].down(0)), ffn.groups[0].down(0).device
    found_TH = torch.zeros(tokens, hidden, device=device)
    start = 0
    for count, calls in phi:
        for call in calls:
            bias_H = groups[call.path].down_bias(call.expert)
            if bias_H is None:
                continue
            rows = slice(None) if call.tokens_N is None else call.tokens_N
            weight = 1.0 if call.a_N is None else call.a_N[:, None]
            found_TH[start : start + count][rows] += weight * bias_H
        start += count
    return found_TH


def inverse_norms(h_TH: torch.Tensor) -> torch.Tensor:
    """mean |h| / |h_t| of hidden states, fp32 [T, 1]: what each token's error counts."""
    norm_T1 = torch.linalg.vector_norm(h_TH.float(), dim=1, keepdim=True)
    sum_and_tokens = torch.stack([norm_T1.sum(), torch.tensor(len(norm_T1)).to(norm_T1)])
    mean = torch.div(*distributed.all_sum(sum_and_tokens))
    return mean / norm_T1.clamp(min=TINY * mean)


def _after(
    stream_TH: torch.Tensor, seen: Seen, before: Weights, residual_scale: float
) -> torch.Tensor:
    """The hidden states after the uncut layer, in the place of those before it."""
    for place, (tokens_N, phi_NF) in seen.items():
        y_NH = ExpertRegression(tokens_N, phi_NF, before[place].T).output().mul_(residual_scale)
        if tokens_N is None:
            stream_TH += y_NH
        else:
            stream_TH.index_copy_(0, tokens_N, stream_TH.index_select(0, tokens_N) + y_NH)
    return stream_TH


def _by_expert(phi: list[tuple[int, list[ExpertPhi]]]) -> Seen:
    """Tokens, counted over all batches (None for all), and phi of every expert that was reached."""
    parts: dict[tuple[str, int], list[tuple[torch.Tensor | None, torch.Tensor]]] = {}
    start = 0
    for tokens, calls in phi:
        for call in calls:
            shifted_N = None if call.tokens_N is None else call.tokens_N + start
            parts.setdefault((call.path, call.expert), []).append((shifted_N, call.phi_NW))
        start += tokens
        calls.clear()
    found = {}
    for place in list(parts):  # each expert's parts are freed as soon as they are joined
        places, tables = zip(*parts.pop(place), strict=True)
        found[place] = (None if places[0] is None else torch.cat(places), torch.cat(tables))
    return found


def _no_tokens(down_HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_N = torch.zeros(0, dtype=torch.int64, device=down_HW.device)
    return tokens_N, down_HW.new_zeros(0, down_HW.shape[1])
