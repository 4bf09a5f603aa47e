"""The base class of scores that rank micro-experts, and their registry.

Shapes: N micro-experts of a layer's pool.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from camera.runtime.errors import CameraError
from camera.runtime.registry import Registry

if TYPE_CHECKING:
    import torch

    from camera.calibration.observers import ObserverSpec
    from camera.calibration.statistics import LayerStatistics

SCORES = Registry(
    "score",
    "method.score",
    packages=("camera.calibration.scores", "baselines.micro_experts"),
    entry_points="camera.scores",
)


@dataclass(frozen=True)
class Score(ABC):
    """A ranking of micro-experts; a subclass with a `name` is known by it.

    Its fields are settings; a method that offers the score by name has fields of the same names.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            SCORES.register(cls)

    def observer(self) -> ObserverSpec | None:
        """The observer of the statistics that the score reads; None: it needs none."""
        return None

    def values(self, seen: LayerStatistics) -> torch.Tensor:
        """Scores of a layer's micro-experts, fp64 [N]; the lowest are pruned."""
        raise NotImplementedError

    def of_layer(self, index: int, seen: LayerStatistics | None, count: int) -> torch.Tensor:
        """Scores of the `count` micro-experts of layer `index`."""
        return self.values(seen)


def score_of(method: Any) -> Score:
    """The score that a method's setting `score` names, with the method's settings of it.

    Raises CameraError for an unknown score, and for a setting of another score that was changed.
    """
    cls = SCORES[method.score]
    known = {f.name for f in fields(cls)}
    offered = {"alpha", "normalize"} & {f.name for f in fields(method)}
    for setting in fields(method):
        name, value = setting.name, getattr(method, setting.name)
        if name in offered - known and value != setting.default:
            raise CameraError(
                f"{name}={value} is no setting of score={method.score}: leave it at "
                f"{setting.default}, or choose another score."
            )
    return cls(**{name: getattr(method, name) for name in offered & known})
