"""Second moments of activations and their gradients, and the scores HEAPr and Fisher.

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts 0, 1, ...;
within an expert by row), E experts of the pool; in tensors of one expert N tokens and W its width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.scores.base import Score
from camera.calibration.scores.energy import EnergyObserver, EnergyStatistics
from camera.moe.feed_forward import FeedForward
from camera.moe.gradients import GradientCall
from camera.moe.pool import PoolIndex, sum_dtype
from camera.runtime.errors import CameraError

Normalize = Literal["routed", "all"]


@dataclass
class GradientStatistics(EnergyStatistics):
    """A layer's energies and second moments of its activations h and of their gradients.

    h2_N = sum over tokens of h^2, dh2_N = of (dloss/dh)^2, joint_N = of (h * dloss/dh)^2, all fp64;
    h before the routing weight a, so h * dloss/dh = phi * dloss/dphi with phi = a * h.
    """

    kind: ClassVar[str] = "sensitivity"
    reduced: ClassVar[dict[str, str]] = EnergyStatistics.reduced | {
        "h2_N": "sum",
        "dh2_N": "sum",
        "joint_N": "sum",
    }
    h2_N: torch.Tensor
    dh2_N: torch.Tensor
    joint_N: torch.Tensor

    def product(self, normalize: Normalize = "routed") -> torch.Tensor:
        """s_i = mean(h_i^2) * mean((dloss/dh_i)^2) over the tokens its expert saw, fp64 [N].

        Equal to mean(h_i^2) * w_i^T G w_i with G = mean(g g^T), g = dloss/d(expert output), which
        no H x H matrix is needed for: w_i^T g = dloss/dh_i. `normalize` all is the sum over tokens
        rather than their mean, so that rarely used experts are cheap. -1 if no token came.
        Source: HEAPr (ICLR 2026), without its constant factor 1/2.
        """
        tokens_N = self._tokens_N()
        return self._scored(self.h2_N * self.dh2_N / tokens_N, tokens_N, normalize)

    def joint(self, normalize: Normalize = "routed") -> torch.Tensor:
        """s_i = mean((h_i * dloss/dh_i)^2) = mean((phi_i * dloss/dphi_i)^2), fp64 [N].

        The empirical Fisher term of scaling micro-expert i, of which `product` takes the factors'
        means; `normalize` and the value -1 as there.
        """
        return self._scored(self.joint_N, self._tokens_N(), normalize)

    def _tokens_N(self) -> torch.Tensor:
        return torch.repeat_interleave(self.tokens_E, torch.tensor(self.widths)).double()

    def _scored(
        self, sum_N: torch.Tensor, tokens_N: torch.Tensor, normalize: Normalize
    ) -> torch.Tensor:
        score_N = sum_N / tokens_N if normalize == "routed" else sum_N
        return torch.where(tokens_N > 0, score_N, -1.0)


class GradientObserver(LayerObserver):
    """Gathers second moments, and energies with them, from one backward pass."""

    def __init__(self, ffn: FeedForward):
        self._energy, self._index = EnergyObserver(ffn), PoolIndex(ffn)
        device = next(ffn.module.parameters()).device
        shape = (3, self._index.micro_experts)
        self._sums_3N = torch.zeros(*shape, dtype=sum_dtype(device), device=device)

    def __call__(self, call: GradientCall) -> None:
        self._energy(call)
        rows = self._index.rows(call.group.path, call.expert)
        for sum_N, term_NW in zip(
            self._sums_3N, (call.h_NW, call.dh_NW, call.h_NW * call.dh_NW), strict=True
        ):
            sum_N[rows] += term_NW.square().sum(0)

    def result(self) -> GradientStatistics:
        """The statistics gathered so far, on the CPU."""
        energy = self._energy.result()
        h2_N, dh2_N, joint_N = self._sums_3N.cpu().double()
        return GradientStatistics(
            groups=energy.groups, **energy.tensors(), h2_N=h2_N, dh2_N=dh2_N, joint_N=joint_N
        )


@dataclass(frozen=True)
class GradientSpec(ObserverSpec):
    """Second moments of activations and gradients."""

    statistics: ClassVar[type[GradientStatistics]] = GradientStatistics
    reads: ClassVar[Literal["gradients"]] = "gradients"

    def build(self, index: int, ffn: FeedForward) -> GradientObserver:
        return GradientObserver(ffn)


@dataclass(frozen=True)
class GradientScore(Score):
    """A score of gradients; `normalize` routed takes means over an expert's own tokens, all sums
    over the calibration set."""

    normalize: Normalize = "routed"

    def __post_init__(self) -> None:
        if self.normalize not in get_args(Normalize):
            raise CameraError(f"method.normalize={self.normalize} is none of routed, all.")

    def observer(self) -> ObserverSpec:
        return GradientSpec()


@dataclass(frozen=True)
class FisherScore(GradientScore):
    """Sum over tokens of (phi * dloss/dphi)^2, the Fisher information of scaling a micro-expert."""

    name: ClassVar[str] = "fisher"

    def values(self, seen: GradientStatistics) -> torch.Tensor:
        return seen.joint(self.normalize)


@dataclass(frozen=True)
class ProductScore(GradientScore):
    """HEAPr's score, which multiplies the means of the two factors."""

    name: ClassVar[str] = "product"

    def values(self, seen: GradientStatistics) -> torch.Tensor:
        return seen.product(self.normalize)
