"""What cutting a layer costs the whole model, layer by layer and cut by cut, without gradients.

One pass through the dense model, a layer in memory at a time, carries a few texts through it many
times over: as they are and, from every layer on, once for each trial cut of that layer, in which
micro-experts are silenced. At the end the divergence of the next-token probabilities is what the
cut costs:

    D = sum over tokens of KL(dense || cut)

Measured before any refit; layers are compared with each other, where that matters little.

Shapes: T tokens, H hidden, N micro-experts of a layer's pool, C trial cuts.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import kl_div, log_softmax

from camera.blocks import FeedForward
from camera.errors import CameraError
from camera.head import loaded_head, logits, tokens_at_once
from camera.progress import EachLayer
from camera.statistics import LayerStatistics
from camera.stream import Batch, Streamer

TRIALS = (0.25, 0.5, 0.75, 0.9, 1.0)  # shares of what a layer may lose
TOKENS = 1024  # of the calibration text, over all processes


@dataclass
class LayerCuts(LayerStatistics):
    """What trial cuts of one layer cost: nats, summed over the tokens they were tried on."""

    kind: ClassVar[str] = "cuts"
    reduced: ClassVar[dict[str, str]] = {"removed_C": "max", "cost_C": "sum"}
    removed_C: torch.Tensor  # int64
    cost_C: torch.Tensor  # fp64


Trials = dict[int, list[torch.Tensor]]
"""By layer: which micro-experts stay, bool [N], each cut removing what the one before it did."""


def trial_tokens(ids_NL: torch.Tensor, processes: int) -> torch.Tensor:
    """The calibration tokens that a process tries cuts on: whole samples if they are shorter."""
    most = -(-TOKENS // processes)
    return ids_NL[: max(1, most // ids_NL.shape[1]), :most]


def trial_bytes(layers: int, hidden: int) -> int:
    """What the hidden states of all trials take, in fp32."""
    return 4 * TOKENS * hidden * layers * len(TRIALS)


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
            "stay on disk: set memory.experts=layer, or method.rank_scope=global."
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
