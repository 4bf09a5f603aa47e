"""The settings of compensation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from camera.runtime.errors import CameraError

Scope = Literal["expert", "layer"]
Target = Literal["layer", "dense"]
TokenWeights = Literal["relative", "uniform"]


@dataclass(frozen=True)
class Refit:
    """How compensation is done: `scope` layer fits all experts of a layer together, expert each to
    its own removed output; `target` layer is what the uncut layer puts out for what reaches it,
    dense what the dense model has there (its hidden states after the layer), which makes up for
    errors of the layers before; the output weights of the attention are then refitted as well, to
    the dense model's hidden states after it (see `camera.compensation.attention`). `token_weights` relative is as
    above, with uniform all c_t are 1.
    `ridges` are tried from the largest, `sweeps` over the experts at most for each, as long as the
    share `held_out` of the calibration samples gets closer.
    """

    scope: Scope = "layer"
    target: Target = "layer"
    token_weights: TokenWeights = "relative"
    ridges: Sequence[float] = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
    sweeps: int = 8
    held_out: float = 0.125

    def __post_init__(self) -> None:
        for key, value, known in (
            ("compensate", self.scope, ("none", *get_args(Scope))),
            ("target", self.target, get_args(Target)),
            ("token_weights", self.token_weights, get_args(TokenWeights)),
        ):
            if value not in known:
                raise CameraError(f"{key}={value} is none of {', '.join(known)}.")
        if self.scope == "expert" and self.target == "dense":
            raise CameraError(
                "target=dense needs compensate=layer: with compensate=expert set target=layer."
            )
        if not self.ridges or min(self.ridges) <= 0:
            raise CameraError(f"ridges={list(self.ridges)} must be positive numbers.")
        if self.sweeps < 1 or not 0 < self.held_out < 1:
            raise CameraError(
                f"sweeps={self.sweeps} must be at least 1 and held_out={self.held_out} lie between "
                "0 and 1."
            )

    def fitted(self, samples: int, length: int) -> int:
        """How many tokens of so many samples are fitted to: those of the first ones."""
        held_out = min(max(1, round(samples * self.held_out)), samples - 1)
        return length * (samples - held_out)
