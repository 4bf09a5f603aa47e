"""The trial pass: KL divergence at the logits caused by pruning one layer at a time.

One pass through the dense model, a layer in memory at a time, carries a few texts through it many
times over: as they are and, from every layer on, once for each trial of that layer, in which
micro-experts are zeroed. At the end the divergence of the next-token probabilities is the cost of a
trial:

    D = sum over tokens of KL(dense || pruned)

Measured before any refit; layers are compared with each other, where that matters little.

Shapes: T tokens, H hidden, N micro-experts of a layer's pool, C trials.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch
from torch.nn.functional import kl_div, log_softmax

from camera.calibration.statistics import LayerStatistics, Statistics
from camera.calibration.trials import TOKENS, TrialMasks, TrialStatistics, trial_sample
from camera.method import Pass, Seen
from camera.moe.feed_forward import FeedForward
from camera.pipeline.cache import gathered_once
from camera.pipeline.context import PassContext
from camera.pipeline.resume import PassProgress
from camera.runtime import distributed
from camera.runtime.errors import CameraError
from camera.runtime.progress import EachLayer
from camera.streaming.batches import LayerInput
from camera.streaming.lm_head import lm_head_loaded, logits, tokens_per_chunk
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer


class TrialPass:
    """Gathers the costs of trial pruning, cached like other statistics of the dense model."""

    def __init__(self, context: PassContext):
        self._context = context

    def run(self, step: Pass, seen: Seen) -> dict[int, LayerStatistics]:
        """The costs of every layer that has trials; CameraError where experts stay on disk."""
        context = self._context
        masks, digest = step.trials(seen, context.budget), sha256()
        for index in sorted(masks):
            digest.update(torch.stack(masks[index]).numpy().tobytes())
        kind = TrialStatistics.kind
        key = {"kind": kind, "tokens": TOKENS, "plans": digest.hexdigest()}

        def gather(progress: PassProgress, folder: Path) -> Statistics:
            ids_NL = trial_sample(context.ids_NL, distributed.world())
            found = trial_costs(context.streamer, ids_NL, masks, context.each_layer)
            distributed.barrier()
            reduced = {index: found[index].all_reduced() for index in found}
            return Statistics(reduced, context.about("dense"))

        return gathered_once(context, key, TrialStatistics, type(self), gather).layers


@torch.no_grad()
def trial_costs(
    streamer: LayerStreamer, ids_NL: torch.Tensor, masks: TrialMasks, each_layer: EachLayer
) -> dict[int, TrialStatistics]:
    """The cost of every trial; CameraError where experts stay on disk."""
    if streamer.placement.experts_on_disk:
        raise CameraError(
            "method.rank_scope=measured zeroes micro-experts, which can't be done while experts "
            "stay on disk: set memory.experts=ram, or method.rank_scope=global."
        )
    model = streamer.model
    (dense,) = streamer.embed([{"input_ids": ids_NL}])
    pruned: dict[tuple[int, int], LayerInput] = {}
    groups: dict[int, dict[str, list[int]]] = {}
    for index in each_layer("trial pruning", 0):
        streamer.load_layer(index)
        places = list(pruned)
        inputs = streamer.attend(index, [dense, *pruned.values()])
        entered = inputs[0]
        dense, *others = streamer.run_layer(index, inputs)
        pruned = dict(zip(places, others, strict=True))
        ffn = model.feed_forward(index)
        groups[index] = {group.path: group.widths for group in ffn.groups}
        for trial, keep_N in enumerate(masks.get(index, [])):
            zero_output_weights(ffn, ~keep_N)
            (pruned[index, trial],) = streamer.run_layer(index, [entered])
        model.free_layer(index)
    found = {}
    with lm_head_loaded(model) as vocabulary:
        chunk = tokens_per_chunk(vocabulary)
        for index in each_layer("compare trials", 0):
            if index in masks:
                tried = [pruned.pop((index, trial)) for trial in range(len(masks[index]))]
                found[index] = TrialStatistics(
                    groups=groups[index],
                    removed_C=torch.stack([(~keep_N).sum() for keep_N in masks[index]]),
                    cost_C=_divergence(model, dense, tried, chunk),
                )
    return found


def zero_output_weights(ffn: FeedForward, gone_N: torch.Tensor) -> None:
    """Set the output weights of these micro-experts of a loaded layer to zero, in place."""
    parts = iter(gone_N.split(ffn.widths))
    for group in ffn.groups:
        for expert in range(len(group.widths)):
            down_HW = group.down(expert)
            down_HW.masked_fill_(next(parts).to(down_HW.device), 0.0)


def _divergence(
    model: MetaModel, dense: LayerInput, tried: list[LayerInput], tokens: int
) -> torch.Tensor:
    """fp64 [C]: D of each trial, from the hidden states after the last layer."""
    cost_C = torch.zeros(len(tried), dtype=torch.float64)
    dense_TH = dense.hidden_BLH.flatten(0, 1)
    for start in range(0, len(dense_TH), tokens):
        part = slice(start, start + tokens)
        expected_TV = log_softmax(logits(model, dense_TH[part]), -1)
        for trial, batch in enumerate(tried):
            cut_TH = batch.hidden_BLH.flatten(0, 1)[part]
            found_TV = log_softmax(logits(model, cut_TH), -1)
            cost_C[trial] += kl_div(found_TV, expected_TV, reduction="sum", log_target=True).cpu()
    return cost_C
