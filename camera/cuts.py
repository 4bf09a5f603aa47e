"""What cutting a layer costs the whole model, layer by layer and cut by cut, without gradients.

One pass through the dense model, a layer in memory at a time, carries a few texts through it many
times over: as they are and, from every layer on, once for each trial cut of that layer, in which
micro-experts are silenced. At the end the divergence of the next-token probabilities is what the
cut costs:

    D = sum over tokens of KL(dense || cut)

Where the run refits what stays of a layer, trial cuts are refitted too, to the layer's own output
on other calibration tokens than those they are tried on: half of what a cut costs is made good by
that, and not the same part in every layer.

Shapes: T tokens, H hidden, N micro-experts of a layer's pool, C trial cuts.
"""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn.functional import kl_div, log_softmax

from camera import parallel
from camera.blocks import FeedForward
from camera.compensate import Weights, after, by_expert, fit_cut, inverse_norms, output_weights
from camera.errors import CameraError
from camera.head import loaded_head, logits, tokens_at_once
from camera.memory import BATCH_TOKENS
from camera.progress import EachLayer
from camera.refit import Refit
from camera.slicer import Kept, kept_rows
from camera.statistics import LayerStatistics
from camera.stream import Batch, Streamer

TRIALS = (0.25, 0.5, 0.75, 0.9, 1.0)  # shares of what a layer may lose
TOKENS = 1024  # of the calibration text, over all processes
FIT_TOKENS = 16384  # others of it, that trial cuts are refitted on
RIDGE = 0.3  # what most layers' fits choose
SWEEPS = 2


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
    how: Refit | None = None,
) -> dict[int, LayerCuts]:
    """The cost of every trial cut on the first of these tokens, refitted on others as `how` says.

    CameraError where experts are visited one by one on disk.
    """
    if streamer.visit:
        raise CameraError(
            "method.rank_scope=measured silences micro-experts, which can't be done while experts "
            "stay on disk: set memory.experts=layer, or method.rank_scope=global."
        )
    tried_NL = trial_tokens(ids_NL, parallel.world())
    (dense,) = streamer.embed([{"input_ids": tried_NL}])
    others = None
    if how is not None:  # the calibration text may be a single sample
        rest_NL = ids_NL[len(tried_NL) :]
        others = Others(streamer, rest_NL if len(rest_NL) else ids_NL, how)
    cut: dict[tuple[int, int], Batch] = {}
    groups: dict[int, dict[str, list[int]]] = {}
    for index in each_layer("try cuts", 0):
        streamer.load_layer(index)
        streamer.attend(index, [dense, *cut.values()])
        entered = copy.copy(dense)
        streamer.propagate(index, [dense, *cut.values()])
        ffn = streamer.feed_forward(index)
        groups[index] = {group.path: group.widths for group in ffn.groups}
        before = {place: down_HW.clone() for place, down_HW in output_weights(ffn).items()}
        if others is not None:
            others.pass_through(index, before)
        for trial, keep_N in enumerate(trials.get(index, [])):
            kept = kept_rows(ffn, keep_N)
            silence(ffn, before, kept, others.refitted(before, kept) if others else {})
            cut[index, trial] = copy.copy(entered)
            streamer.propagate(index, [cut[index, trial]])
        streamer.free(streamer.layers[index])
    cost = _divergence(streamer, dense, cut)
    return {
        index: LayerCuts(
            groups=groups[index],
            removed_C=torch.stack([(~keep_N).sum() for keep_N in trials[index]]),
            cost_C=torch.stack([cost[index, trial] for trial in range(len(trials[index]))]),
        )
        for index in trials
    }


class Others:
    """Calibration tokens that trial cuts are refitted on, on their way through the dense model."""

    def __init__(self, streamer: Streamer, ids_NL: torch.Tensor, how: Refit):
        most = -(-FIT_TOKENS // parallel.world())
        ids_NL = ids_NL[: max(1, most // ids_NL.shape[1])]
        size = max(1, BATCH_TOKENS // ids_NL.shape[1])
        self._streamer = streamer
        self._batches = streamer.embed({"input_ids": ids} for ids in ids_NL.split(size))
        self._fitted, self._tokens = how.fitted(*ids_NL.shape), ids_NL.numel()
        self._how = replace(how, target="layer", ridges=(RIDGE,), sweeps=SWEEPS)

    def pass_through(self, index: int, before: Weights) -> None:
        """Run a loaded, uncut layer, of which `before` are the output weights; keep its phi."""
        streamer, batches = self._streamer, self._batches
        streamer.attend(index, batches)
        streamer.observe(index, batches, trace=True)
        self._seen, self._scale_T1 = by_expert([batch.trace for batch in batches]), None
        if self._how.errors == "relative":
            stream_TH = streamer.hidden(batches)
            scale = streamer.feed_forward(index).residual_scale
            self._scale_T1 = inverse_norms(after(stream_TH, self._seen, before, scale))
        for batch in batches:
            batch.trace = None
        streamer.propagate(index, batches)

    def refitted(self, before: Weights, kept: Kept) -> Weights:
        """The output weights of what stays of that layer."""
        blocks, _ = fit_cut(
            dict(self._seen),
            before,
            kept,
            self._tokens,
            self._fitted,
            self._how,
            scale_T1=self._scale_T1,
        )
        return {place: block.weight_WH.T for place, block in blocks.items()}


def silence(ffn: FeedForward, before: Weights, kept: Kept, refitted: Weights) -> None:
    """Give a loaded layer, in place, the output weights it has after a cut: zero for what is gone,
    for what is `kept` those `refitted` or, where there are none, those it had `before`."""
    for group in ffn.groups:
        for expert, rows in enumerate(kept[group.path]):
            place, down_HW = (group.path, expert), group.down(expert)
            rows = rows.to(down_HW.device)
            stay_HW = refitted.get(place)
            if stay_HW is None:
                stay_HW = before[place].index_select(1, rows)
            down_HW.zero_()
            down_HW[:, rows] = stay_HW.to(down_HW.dtype)


def _divergence(
    streamer: Streamer, dense: Batch, cut: dict[tuple[int, int], Batch]
) -> dict[tuple[int, int], torch.Tensor]:
    cost = {key: torch.zeros((), dtype=torch.float64) for key in cut}
    dense_TH = dense.hidden_BLH.flatten(0, 1)
    with loaded_head(streamer) as vocabulary:
        rows = tokens_at_once(vocabulary, tables=8)
        for start in range(0, len(dense_TH), rows):
            part = slice(start, start + rows)
            expected_TV = log_softmax(logits(streamer, dense_TH[part]), -1)
            for key, batch in cut.items():
                cut_TH = batch.hidden_BLH.flatten(0, 1)[part]
                found_TV = log_softmax(logits(streamer, cut_TH), -1)
                cost[key] += kl_div(found_TV, expected_TV, reduction="sum", log_target=True).cpu()
    return cost
