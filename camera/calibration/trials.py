"""What cutting a layer costs the whole model, layer by layer and cut by cut, without gradients.

One pass through the dense model, a layer in memory at a time, carries a few texts through it many
times over: as they are and, from every layer on, once for each trial cut of that layer, in which
micro-experts are silenced. At the end the divergence of the next-token probabilities is what the
cut costs:

    D = sum over tokens of KL(dense || cut)

Measured before any refit; layers are compared with each other, where that matters little.

Shapes: T tokens, H hidden, N micro-experts of a layer's pool, C trial cuts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from camera.calibration.statistics import LayerStatistics

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
