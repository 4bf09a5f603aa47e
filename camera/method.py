"""What a compression method is: calibrate -> plan -> apply, one layer at a time.

`compress` drives any `Method`; a new one is a class here or in `baselines/` and one YAML.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar

from camera.calibration.scores.energy import EnergyObserver
from camera.calibration.statistics import LayerStatistics
from camera.calibration.trials import LayerCuts, Trials
from camera.compensation.settings import Refit
from camera.moe.budget import Budget
from camera.moe.feed_forward import FeedForward
from camera.moe.pool import Kept

METHODS: dict[str, type["Method"]] = {}


@dataclass
class Outcome:
    """What a method did to one layer.

    `modules` says by path what form now stands there, for config.json; `kept`, where the layer was
    only sliced, which micro-experts stayed; `report` is JSON-able and stands in camera.json.
    """

    modules: dict[str, dict[str, Any]]
    kept: Kept | None = None
    report: dict[str, Any] = field(default_factory=dict)


class Method(ABC):
    """A way to choose what of each layer stays; subclasses are dataclasses of their settings."""

    name: ClassVar[str]
    calibrates: ClassVar[bool]  # whether its plan needs calibration tokens
    compresses: ClassVar[bool] = True
    slices: ClassVar[bool] = False  # only removes micro-experts: phi of the others stays true
    native: ClassVar[bool] = False  # writes a plain checkpoint of the model's own type
    backward: ClassVar[bool] = False  # its statistics need gradients
    storable: ClassVar[bool] = True  # its statistics are small enough to keep for all layers
    cuts: dict[int, LayerCuts]  # what its `trials` cost, if it has any: set before `prepare`

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    def settings(self) -> dict[str, Any]:
        """The settings that change what the method does, for hashes and reports."""
        return asdict(self) if is_dataclass(self) else {}

    @property
    def one_shot(self) -> bool:
        """Whether all layers are measured, on the dense model, before the first is compressed."""
        return self.backward

    @property
    def asks_head(self) -> bool:
        """Whether it looks at what the whole model puts out, next-token probabilities."""
        return self.backward

    @property
    def compensation(self) -> Refit | None:
        """How the output weights of a cut layer are refitted to what it put out; None: not at all.

        For methods that slice, in a pass in which each layer is fed by the compressed ones.
        """
        return None

    @property
    def reads_text(self) -> bool:
        """Whether calibration tokens are needed at all."""
        return self.calibrates or self.compensation is not None

    @abstractmethod
    def check(self, budget: Budget) -> None:
        """Refuse what can't be done with this model, before any weight is read."""

    def statistics_key(self) -> dict[str, Any]:
        """What decides the statistics besides model and tokens: runs that agree share them."""
        return {"kind": "energy"}

    def observer(self, index: int, ffn: FeedForward) -> Any:
        """What looks at layer `index` in a calibration pass; its `result` is what is seen."""
        return EnergyObserver(ffn)

    def holds(self, budget: Budget) -> int:
        """Bytes that what is seen of a layer, and working on it, take beside the layer."""
        return 0

    def trials(self, statistics: dict[int, LayerStatistics], budget: Budget) -> Trials:
        """Cuts whose cost is to be measured before `prepare`, by what was seen; none by default."""
        return {}

    def prepare(  # noqa: B027 (most methods have nothing to do here)
        self, statistics: dict[int, LayerStatistics], budget: Budget
    ) -> None:
        """Plan what needs all layers at once; called before the first `compress` if one_shot."""

    def enter(self, index: int, ffn: FeedForward) -> dict[str, dict[str, Any]]:
        """Change what layer `index` has outside its pool, before it is run; the forms by path."""
        return {}

    @abstractmethod
    def compress(
        self, index: int, ffn: FeedForward, seen: LayerStatistics | None, budget: Budget
    ) -> Outcome:
        """Plan layer `index` by what was seen of it, and change its modules in place."""

    def native_config(self, config: Any, budget: Budget) -> dict[str, Any]:
        """The keys of config.json that a native checkpoint changes."""
        return {}
