"""KL divergence at the logits caused by pruning one layer at a time.

Shapes: T tokens, H hidden, N micro-experts of a layer's pool, C trial cuts.
"""

import copy

import torch
from torch.nn.functional import kl_div, log_softmax

from camera.calibration.trials import LayerCuts, Trials
from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError
from camera.runtime.progress import EachLayer
from camera.streaming.batches import Batch
from camera.streaming.lm_head import loaded_head, logits, tokens_at_once
from camera.streaming.streamer import Streamer


@torch.no_grad()
def measure(
    streamer: Streamer,
    ids_NL: torch.Tensor,
    trials: Trials,
    each_layer: EachLayer,
) -> dict[int, LayerCuts]:
    """The cost of every trial cut; CameraError where experts are visited one by one on disk."""
    if streamer.visit:
        raise CameraError(
            "method.rank_scope=measured silences micro-experts, which can't be done while experts "
            "stay on disk: set memory.experts=ram, or method.rank_scope=global."
        )
    (dense,) = streamer.embed([{"input_ids": ids_NL}])
    cut: dict[tuple[int, int], Batch] = {}
    groups: dict[int, dict[str, list[int]]] = {}
    for index in each_layer("try cuts", 0):
        streamer.load_layer(index)
        streamer.attend(index, [dense, *cut.values()])
        entered = copy.copy(dense)
        streamer.propagate(index, [dense, *cut.values()])
        ffn = streamer.feed_forward(index)
        groups[index] = {group.path: group.widths for group in ffn.groups}
        for trial, keep_N in enumerate(trials.get(index, [])):
            silence(ffn, ~keep_N)
            cut[index, trial] = copy.copy(entered)
            streamer.propagate(index, [cut[index, trial]])
        streamer.free(streamer.layers[index])
    found = {}
    with loaded_head(streamer) as vocabulary:
        for index in each_layer("compare cuts", 0):
            if index in trials:
                tried = [cut.pop((index, trial)) for trial in range(len(trials[index]))]
                found[index] = LayerCuts(
                    groups=groups[index],
                    removed_C=torch.stack([(~keep_N).sum() for keep_N in trials[index]]),
                    cost_C=_divergence(streamer, dense, tried, tokens_at_once(vocabulary)),
                )
    return found


def silence(ffn: FeedForward, gone_N: torch.Tensor) -> None:
    """Set the output weights of these micro-experts of a loaded layer to zero, in place."""
    parts = iter(gone_N.split(ffn.widths))
    for group in ffn.groups:
        for expert in range(len(group.widths)):
            down_HW = group.down(expert)
            down_HW.masked_fill_(next(parts).to(down_HW.device), 0.0)


def _divergence(streamer: Streamer, dense: Batch, tried: list[Batch], tokens: int) -> torch.Tensor:
    """fp64 [C]: D of each trial, from the hidden states after the last layer."""
    cost_C = torch.zeros(len(tried), dtype=torch.float64)
    dense_TH = dense.hidden_BLH.flatten(0, 1)
    for start in range(0, len(dense_TH), tokens):
        part = slice(start, start + tokens)
        expected_TV = log_softmax(logits(streamer, dense_TH[part]), -1)
        for trial, batch in enumerate(tried):
            cut_TH = batch.hidden_BLH.flatten(0, 1)[part]
            found_TV = log_softmax(logits(streamer, cut_TH), -1)
            cost_C[trial] += kl_div(found_TV, expected_TV, reduction="sum", log_target=True).cpu()
    return cost_C
