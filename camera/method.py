"""The contract between a compression method and the pipeline: passes, plans, what changes.

A method is a frozen set of settings. It declares the passes over the model that it needs, makes a
plan of what was seen, and applies the plan to one layer at a time. The pipeline streams, resumes,
writes and counts.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from camera.runtime.errors import CameraError
from camera.runtime.files import CheckpointFiles, usual_mode
from camera.runtime.registry import Registry
from camera.runtime.values import seed_of, typed

if TYPE_CHECKING:
    from torch import Tensor

    from camera.calibration.observers import ObserverSpec
    from camera.calibration.statistics import LayerStatistics
    from camera.calibration.trials import TrialMasks
    from camera.compensation.settings import CompensationSettings
    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward
    from camera.moe.pool import KeptRows, LayerPool, LayerShape

METHODS = Registry(
    "method",
    "method",
    packages=("camera.pruning", "camera.quantization", "baselines"),
    entry_points="camera.methods",
)
PLANS = Registry(
    "kind of plan", "plan.kind", packages=("camera.pruning", "camera.quantization", "baselines")
)

Propagate = Literal["compressed", "dense"]
RankScope = Literal["layer", "global", "measured"]
Spec = dict[str, Any]


class PassKind(StrEnum):
    """The ways over a model; COMPRESSED is always the last one."""

    WEIGHTS = "weights"  # layers one by one, no tokens
    DENSE = "dense"  # tokens through the dense model
    BACKWARD = "backward"  # ... and back
    TRIAL = "trial"  # the dense model with one layer pruned at a time
    COMPRESSED = "compressed"  # each layer observed, planned, compressed, written


Seen = Mapping[PassKind, Mapping[int, "LayerStatistics"]]
"""Statistics by pass and layer."""


@dataclass(frozen=True)
class Pass:
    """One way over the model.

    `observer` looks at every layer of the pool; `trials` makes the masks of a TRIAL pass from what
    was seen; of the COMPRESSED pass `feed` says whose output the next layer gets, and `tokens`
    whether text passes through at all.
    """

    kind: PassKind
    observer: ObserverSpec | None = None
    trials: Callable[[Seen, Budget], TrialMasks] | None = None
    feed: Propagate = "compressed"
    tokens: bool = True

    @property
    def reads_text(self) -> bool:
        """Whether calibration tokens are needed."""
        if self.kind == PassKind.COMPRESSED:
            return self.tokens
        return self.kind != PassKind.WEIGHTS


@dataclass(frozen=True)
class Applied:
    """What changed in one layer: specs by module path for config.json, rows that stayed where the
    layer was only sliced, a JSON-able report for camera.json."""

    modules: dict[str, Spec] = field(default_factory=dict)
    kept: KeptRows | None = None
    report: dict[str, Any] = field(default_factory=dict)


class LayerPlan(ABC):
    """The decision for one layer; subclasses are registered by their `kind`."""

    kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            PLANS.register(cls, cls.kind)

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The rest, JSON-able."""

    @classmethod
    @abstractmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> LayerPlan:
        """The inverse of `tensors` and `facts`."""

    def misfit(self, pool: LayerPool, hidden: int) -> str | None:
        """What of the plan is not of a layer with this pool and width; None where all is."""
        return None


@dataclass(frozen=True)
class Plan:
    """The decisions of a method for a model: by layer, and those that all layers share.

    `scores` are those of the dense model, fp64 [N], where layers are ranked by it that are planned
    on the way. `model` is what it was made for: model_type and hidden_size (empty in plans of
    before).
    """

    method: str
    settings: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)
    layers: dict[int, LayerPlan] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def with_layer(self, index: int, layer: LayerPlan) -> Plan:
        """The plan with the decision of one more layer."""
        return replace(self, layers={**self.layers, index: layer})

    def save(self, path: Path) -> None:
        """Write all to one safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            f"{index}.{name}": tensor.detach().cpu().contiguous()
            for index, layer in sorted(self.layers.items())
            for name, tensor in layer.tensors().items()
        }
        tensors |= {f"scores.{index}": score_N for index, score_N in sorted(self.scores.items())}
        layers = {
            str(index): {"kind": layer.kind, "facts": layer.facts()}
            for index, layer in sorted(self.layers.items())
        }
        header = {"method": self.method, "settings": self.settings, "shared": self.shared}
        header |= {"model": self.model} if self.model else {}
        # one entry only: safetensors writes several in any order, and files are compared by bytes
        with usual_mode(path):
            save_file(tensors, path, metadata={"camera": json.dumps(header | {"layers": layers})})

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a file of `save`, or the plan.safetensors of a checkpoint's folder.

        CameraError if it is missing or broken.
        """
        from safetensors import safe_open

        path = Path(path).expanduser()
        path = path / CheckpointFiles.PLAN if path.is_dir() else path
        try:
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["camera"])
                tensors: dict[str, dict[str, Tensor]] = {i: {} for i in header["layers"]}
                tensors["scores"] = {}
                for key in file.keys():  # noqa: SIM118 (a file is no dict)
                    index, _, name = key.partition(".")
                    tensors[index][name] = file.get_tensor(key)
            METHODS[header["method"]]  # what defines its kinds of plan is imported with it
            layers = {
                int(index): PLANS[entry["kind"]].of(tensors[index], entry["facts"])
                for index, entry in header["layers"].items()
            }
            scores = {int(index): score_N for index, score_N in tensors["scores"].items()}
            shared, model = dict(header["shared"]), dict(header.get("model", {}))
            return cls(header["method"], dict(header["settings"]), shared, layers, scores, model)
        except CameraError:
            raise
        except Exception as error:  # a file of any content; what it leads to depends on the kind
            raise CameraError(f"plan {path} can't be read ({error}): make it again.") from error


@dataclass(frozen=True)
class Method(ABC):
    """A set of settings that says what to look at, what stays, and how a layer changes."""

    name: ClassVar[str]
    compresses: ClassVar[bool] = True
    slices: ClassVar[bool] = False  # only removes micro-experts: phi of the others stays valid
    plan_kind: ClassVar[str | None] = None  # of its layers' plans, where it has one kind only
    native: ClassVar[bool] = False  # writes a checkpoint of the base model's type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            METHODS.register(cls)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in (f.name for f in fields(self)):
            value = typed(hints[name], getattr(self, name), name)
            object.__setattr__(self, name, seed_of(value) if name == "seed" else value)

    def settings(self) -> dict[str, Any]:
        """The settings that change what the method does, for hashes and reports."""
        return asdict(self)

    @property
    def compensation(self) -> CompensationSettings | None:
        """How output weights of a pruned layer are refitted; None: not at all."""
        return None

    @property
    @abstractmethod
    def reads_text(self) -> bool:
        """Whether any pass needs calibration tokens."""

    @abstractmethod
    def check(self, budget: Budget) -> None:
        """Refuse what can't be done with this model, before any weight is read."""

    @abstractmethod
    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        """The passes over the model, in order; the last one is COMPRESSED."""

    def passes_of_plan(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        """The passes that applying a finished plan still takes."""
        last = self.passes(budget, propagate)[-1]
        return (replace(last, observer=None, tokens=self.compensation is not None),)

    def plan(self, seen: Seen, budget: Budget) -> Plan:
        """Plan what needs all layers at once; layers that it leaves open are planned one by one."""
        return Plan(self.name, self.settings())

    def plan_layer(
        self,
        index: int,
        ffn: FeedForward,
        seen: LayerStatistics | None,
        budget: Budget,
        plan: Plan,
    ) -> LayerPlan:
        """The plan of a layer that `plan` left open, from what was seen of it."""
        raise NotImplementedError

    @abstractmethod
    def apply(
        self, index: int, ffn: FeedForward, plan: LayerPlan, seen: LayerStatistics | None
    ) -> Applied:
        """Change the modules of a loaded layer in place, as planned."""

    def prepare_layer(self, index: int, ffn: FeedForward) -> dict[str, Spec]:
        """Change modules outside the pool before the layer runs; specs by module path."""
        return {}

    def apply_bytes(self, layer: LayerShape) -> int:
        """Bytes of workspace that planning and applying take beside the layer, at most."""
        return 0

    def share_left(self, budget: Budget) -> float:
        """The share of its pool's bytes that a layer keeps at most, as far as settings tell: 1
        where one ranking of all layers may spare one of them."""
        return 1.0

    def native_config(self, config: Any, budget: Budget, plan: Plan) -> dict[str, Any]:
        """The keys of config.json that a native checkpoint of a finished plan changes."""
        return {}
