"""How much the loss feels each micro-expert: sums over calibration tokens, and scores from them.

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts 0, 1, ...;
within an expert by row), E experts of the pool; in tensors of one expert N tokens and W its width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from camera.calibration.scores.energy import EnergyObserver, LayerEnergy
from camera.moe.feed_forward import FeedForward
from camera.moe.gradients import ExpertGradients

Normalize = Literal["routed", "all"]


@dataclass
class LayerSensitivity(LayerEnergy):
    """A layer's energies and second moments of its activations h and of their gradients.

    h2_N = sum over tokens of h^2, dh2_N = of (dloss/dh)^2, joint_N = of (h * dloss/dh)^2, all fp64;
    h before the routing weight a, so h * dloss/dh = phi * dloss/dphi with phi = a * h.
    """

    kind: ClassVar[str] = "sensitivity"
    reduced: ClassVar[dict[str, str]] = LayerEnergy.reduced | {
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


class SensitivityObserver:
    """Gathers a layer's sensitivities, and energies with them, from one backward pass."""

    def __init__(self, ffn: FeedForward):
        self._energy = EnergyObserver(ffn)
        self._rows: dict[tuple[str, int], slice] = {}
        rows = 0
        for group in ffn.groups:
            for expert, width in enumerate(group.widths):
                self._rows[group.path, expert] = slice(rows, rows + width)
                rows += width
        device = next(ffn.module.parameters()).device
        double = torch.float32 if device.type == "mps" else torch.float64
        self._sums_3N = torch.zeros(3, rows, dtype=double, device=device)

    def __call__(self, seen: ExpertGradients) -> None:
        self._energy(seen.group, seen.expert, seen.x_NH, seen.h_NW, seen.a_N)
        rows = self._rows[seen.group.path, seen.expert]
        for sum_N, term_NW in zip(
            self._sums_3N, (seen.h_NW, seen.dh_NW, seen.h_NW * seen.dh_NW), strict=True
        ):
            sum_N[rows] += term_NW.square().sum(0)

    def result(self) -> LayerSensitivity:
        """The statistics gathered so far, on the CPU."""
        energy = self._energy.result()
        h2_N, dh2_N, joint_N = self._sums_3N.cpu().double()
        return LayerSensitivity(
            groups=energy.groups, **energy.tensors(), h2_N=h2_N, dh2_N=dh2_N, joint_N=joint_N
        )
