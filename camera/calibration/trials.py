"""Costs of trial pruning, as statistics.

Shapes: T tokens, N micro-experts of a layer's pool, C trials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from camera.calibration.statistics import LayerStatistics

if TYPE_CHECKING:
    import torch

TRIAL_FRACTIONS = (0.25, 0.5, 0.75, 0.9, 1.0)  # shares of what a layer may lose
TOKENS = 1024  # of the calibration text, over all processes

TrialMasks = dict[int, list["torch.Tensor"]]
"""By layer: which micro-experts stay, bool [N]; each trial removes what the one before it did."""


@dataclass
class TrialStatistics(LayerStatistics):
    """Costs of the trials of one layer: nats, summed over the tokens they were tried on."""

    kind: ClassVar[str] = "cuts"
    reduced: ClassVar[dict[str, str]] = {"removed_C": "max", "cost_C": "sum"}
    removed_C: torch.Tensor  # int64
    cost_C: torch.Tensor  # fp64


def trial_sample(ids_NL: torch.Tensor, processes: int) -> torch.Tensor:
    """The calibration samples used for trial pruning on this rank."""
    most = -(-TOKENS // processes)
    return ids_NL[: max(1, most // ids_NL.shape[1]), :most]


def trial_bytes(layers: int, hidden: int, itemsize: int) -> int:
    """Bytes of the hidden states of all trials: inputs of a layer's FFN, and what these are added
    to."""
    return 2 * itemsize * TOKENS * hidden * layers * len(TRIAL_FRACTIONS)
