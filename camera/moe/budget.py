"""The only place that counts parameters and bits.

Three denominators: `model` is every parameter (tied ones once), `moe` the pool that micro-expert
methods work on (routed and shared experts; in a model without experts its dense FFNs), `routed`
the routed experts alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import TYPE_CHECKING, Any, Literal, get_args

from camera.moe.families import layer_of
from camera.moe.pool import LayerPool
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from torch import nn

    from camera.moe.families.family import Family

SparsityOf = Literal["moe", "model", "routed"]
SPARSITY_OF = get_args(SparsityOf)


@dataclass(frozen=True)
class Sparsity:
    """A share of parameters to remove, in (0, 1), and of what; CameraError for other values."""

    value: float
    of: SparsityOf = "moe"

    def __post_init__(self) -> None:
        if not 0 < self.value < 1:
            raise CameraError(f"sparsity={self.value} must lie between 0 and 1, both excluded.")
        if self.of not in SPARSITY_OF:
            raise CameraError(f"sparsity_of={self.of} is none of {', '.join(SPARSITY_OF)}.")

    def whole(self, budget: Budget) -> int:
        """Parameters of the denominator."""
        return getattr(budget.dense, self.of)


@dataclass(frozen=True)
class Count:
    """Parameters under the three denominators, and bytes of all."""

    model: int
    moe: int
    routed: int
    bytes: int

    def sparsity(self, compressed: Count) -> dict[str, float | None]:
        """Realised share removed under each denominator (None where the model has no such part)."""
        pairs = {name: (getattr(self, name), getattr(compressed, name)) for name in SPARSITY_OF}
        return {name: 1 - after / full if full else None for name, (full, after) in pairs.items()}


@dataclass
class Budget:
    """Parameter counts of a model, and a share of them in micro-experts."""

    dense: Count
    layers: dict[int, LayerPool] = field(default_factory=dict)
    model_type: str = ""
    hidden: int = 0  # width of the residual stream
    weights: dict[str, int] = field(default_factory=dict)  # of the pool's modules, by path

    def prunable(self, sparsity_of: str) -> int:
        """Parameters a method may remove: routed experts only if the share is named of these."""
        return self.dense.routed if sparsity_of == "routed" else self.dense.moe

    def pool_ratio(
        self, sparsity: float, sparsity_of: str, min_width: int = 0, width_multiple: int = 1
    ) -> float:
        """Share of the prunable micro-experts to remove so that `sparsity` of the denominator goes.

        ratio = sparsity * parameters(sparsity_of) / prunable parameters, the same in every layer.
        Raises CameraError, naming the largest possible value, if a layer can't give that much.
        """
        whole, prunable = Sparsity(sparsity, sparsity_of).whole(self), self.prunable(sparsity_of)
        if not prunable:
            what = "routed experts" if sparsity_of == "routed" else "feed-forward layers"
            raise CameraError(
                f"sparsity_of={sparsity_of}: this {self.model_type} model has no {what}; "
                "use sparsity_of=moe."
            )
        largest = min(
            pool.removable(sparsity_of == "routed", min_width, width_multiple)
            for pool in self.layers.values()
        )
        ratio = sparsity * whole / prunable
        if ratio > largest + 1e-9:
            limits = f" with min_width={min_width}" if min_width else ""
            limits += f", width_multiple={width_multiple}" if width_multiple > 1 else ""
            if largest <= 0:
                raise CameraError(
                    f"sparsity={sparsity} of '{sparsity_of}' can't be reached: nothing of a layer "
                    f"of this {self.model_type} model can be removed{limits}."
                )
            raise CameraError(
                f"sparsity={sparsity} of '{sparsity_of}' can't be reached: the largest possible "
                f"for this model{limits} is {floor(largest * prunable / whole * 1e4) / 1e4}."
            )
        return ratio


def to_remove(micro_experts: int, ratio: float) -> int:
    """n = int(N * ratio), as the paper's code, but safe from 0.29 * 100 = 28.999...96."""
    return floor(micro_experts * ratio + 1e-9)


def budget_of(model: nn.Module, layers: Iterable[nn.Module], family: Family, root: str) -> Budget:
    """Count a model (on any device, meta too); `root` is the path of its list of layers."""
    from camera.moe.feed_forward import FeedForward
    from camera.moe.routing import router_constraints

    pools: dict[int, LayerPool] = {}
    views = [FeedForward(layer, family, f"{root}.{i}") for i, layer in enumerate(layers)]
    has_experts = any(view.is_moe for view in views)
    parts: dict[str, bool] = {}  # module path -> routed
    weights: dict[str, int] = {}
    for i, view in enumerate(views):
        if has_experts and not view.is_moe:
            continue  # the first dense layers of a MoE model are never in a pool
        pool = LayerPool([], [], router_constraints(view))
        for group in view.groups:
            parts[group.path] = group.routed
            weights[group.path] = group.module_size
            pool.widths += group.widths
            pool.routed += [group.routed] * len(group.widths)
        pools[i] = pool
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    sizes = {
        name: (p.numel(), p.numel() * p.element_size())
        for name, p in model.state_dict().items()
        if name not in tied
    }
    hidden = model.config.get_text_config().hidden_size
    return Budget(count(sizes, parts), pools, model.config.model_type, hidden, weights)


def require_counts(config: Any, family: Family, shapes: Mapping[str, Sequence[int]]) -> None:
    """CameraError for more layers or experts in config.json than the checkpoint has tensors of.

    `shapes` are the tensors' by name. Compared before a model is built: a wrong number would take
    all memory first.
    """
    layers = {layer_of(name) for name in shapes} - {None}
    experts = 0
    for name, shape in shapes.items():
        number = family.checkpoint_names.number(name)
        if number is not None:
            experts = max(experts, number + 1)
        elif family.checkpoint_names.holds(name):
            experts = max(experts, shape[0])
    for key, most in (("num_hidden_layers", len(layers)), (family.keys.experts, experts)):
        said = getattr(config, key, None)
        if most and isinstance(said, int) and said > most:
            raise CameraError(
                f"config.json says {key}={said}, and the checkpoint has tensors of {most}: fix "
                "config.json, or download the model again."
            )


def count(sizes: dict[str, tuple[int, int]], parts: dict[str, bool]) -> Count:
    """Count tensors {name: (numbers, bytes)}; `parts` are the pool's modules, True if routed."""
    model = moe = routed = size = 0
    for name, (parameters, stored) in sizes.items():
        size += stored
        model += parameters
        part = owner_of(name, parts)
        if part is not None:
            moe += parameters
            routed += parameters if parts[part] else 0
    return Count(model, moe, routed, size)


def owner_of(name: str, paths: Iterable[str]) -> str | None:
    """The module, of these paths, that a tensor belongs to."""
    return next((path for path in paths if name.startswith(path + ".")), None)
