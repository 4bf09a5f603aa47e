"""Settings of compensation: the least-squares refit of output weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from camera.moe.families import family_of
from camera.runtime.errors import CameraError

Scope = Literal["expert", "layer"]
Target = Literal["layer", "between", "dense"]
TokenWeights = Literal["relative", "uniform"]


@dataclass(frozen=True)
class CompensationSettings:
    """How output weights are refitted.

    `scope` layer fits all experts of a layer together, expert each to its own removed output.
    `target` layer is the output of the unpruned layer on the same input; dense is the dense model's
    hidden states after the layer, which also corrects errors of the layers before, and refits the
    output weights of attention too (`camera.compensation.attention`); between is half way from the
    one to the other, attention as it is. `token_weights` relative weighs a token's error by the
    inverse squared norm of its hidden state, uniform weighs all equally. `ridges` are tried from
    the largest, with at most `sweeps` over the experts each, as long as the error on the share
    `held_out` of the calibration samples falls.
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
        if self.scope == "expert" and self.dense_share:
            raise CameraError(
                f"target={self.target} needs compensate=layer: with compensate=expert set "
                "target=layer."
            )
        if not self.ridges or min(self.ridges) <= 0:
            raise CameraError(f"ridges={list(self.ridges)} must be positive numbers.")
        if self.sweeps < 1 or not 0 < self.held_out < 1:
            raise CameraError(
                f"sweeps={self.sweeps} must be at least 1 and held_out={self.held_out} lie between "
                "0 and 1."
            )

    @property
    def dense_share(self) -> float:
        """How much of what is missing to the dense model's hidden states a layer makes up for."""
        return {"layer": 0.0, "between": 0.5, "dense": 1.0}[self.target]

    def check(self, model_type: str) -> None:
        """CameraError where layers of this type don't add to the hidden states what is refitted."""
        norm = family_of(model_type).output_norm if model_type else None
        if norm and (self.dense_share or self.token_weights == "relative"):
            raise CameraError(
                f"compensate={self.scope} refits what a layer adds to the hidden states, and a "
                f"{model_type} model adds it through '{norm}': set target=layer and "
                "token_weights=uniform, or compensate=none."
            )

    def fitted(self, samples: int, length: int) -> int:
        """The number of tokens that are fitted to: those of the first samples."""
        held_out = min(max(1, round(samples * self.held_out)), samples - 1)
        return length * (samples - held_out)
