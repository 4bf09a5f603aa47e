"""What config.json says of packed modules, and the bytes that follow from it.

A spec holds the sizes of a module and how its matrices are cut; every tensor's size is a pure
function of it, so that a budget can be solved before anything is quantised. Biases, which stay as
they are, don't count.
"""

from typing import Any

from camera.checkpoint.formats.packed.layout import PackedMatrices
from camera.checkpoint.formats.packed.segments import Cut

Spec = dict[str, Any]


def experts_spec(
    hidden: int, widths: list[int], gate_up: Cut, down: Cut, group_size: int | None, sym: bool
) -> Spec:
    """Routed experts; gate and up are cut alike. What `down` has in common isn't said twice."""
    both, own = gate_up.json(), down.json()
    return {
        "form": "packed",
        "hidden": hidden,
        "widths": list(widths),
        "group_size": group_size,
        "sym": sym,
        "gate_up": both,
        "down": {key: own[key] for key in own if own[key] != both[key]},
    }


def mlp_spec(
    hidden: int, width: int, gate_up: Cut, down: Cut, group_size: int | None, sym: bool
) -> Spec:
    """A shared expert or dense FFN: the cuts are those of one expert."""
    spec = experts_spec(hidden, [width], gate_up, down, group_size, sym)
    return {**spec, "form": "packed_mlp"}


def linear_spec(
    out_features: int, in_features: int, cut: Cut, group_size: int | None, sym: bool
) -> Spec:
    """One weight [out, in]; `Cut.of("rows", [[bits] * out])` for uniform bits."""
    return {
        "form": "packed_linear",
        "shape": [out_features, in_features],
        "group_size": group_size,
        "sym": sym,
        "cut": cut.json(),
    }


def router_spec(
    out_features: int, in_features: int, cut: Cut, group_size: int | None, sym: bool
) -> Spec:
    """The weight [experts, hidden] of a router that is a module of its own."""
    return {
        **linear_spec(out_features, in_features, cut, group_size, sym),
        "form": "packed_router",
    }


def projections(spec: Spec) -> dict[str, Spec]:
    """The three linear layers of a packed MLP, as specs of their own."""
    hidden, (width,) = spec["hidden"], spec["widths"]
    gate_up, down = cuts(spec)
    common = spec["group_size"], spec["sym"]
    return {
        "gate_proj": linear_spec(width, hidden, gate_up, *common),
        "up_proj": linear_spec(width, hidden, gate_up, *common),
        "down_proj": linear_spec(hidden, width, down, *common),
    }


def cuts(spec: Spec) -> tuple[Cut, Cut]:
    """How gate and up, and how down, of a packed module are cut."""
    gate_up = spec["gate_up"]
    return Cut.from_json(gate_up), Cut.from_json({**gate_up, **spec["down"]})


def layouts_of(spec: Spec) -> dict[str, PackedMatrices]:
    """Where what stands in a packed module, by the name of its codes."""
    common = spec["group_size"], spec["sym"]
    if spec["form"] == "packed":
        gate_up, down = cuts(spec)
        hidden, widths = spec["hidden"], spec["widths"]
        rows, columns = [(width, hidden) for width in widths], [(hidden, width) for width in widths]
        return {
            "gate_up_proj": PackedMatrices(rows, gate_up, *common, parts=2),
            "down_proj": PackedMatrices(columns, down, *common),
        }
    if spec["form"] == "packed_mlp":
        return {
            f"{name}.{codes}": layout
            for name, linear in projections(spec).items()
            for codes, layout in layouts_of(linear).items()
        }
    layout = PackedMatrices([tuple(spec["shape"])], Cut.from_json(spec["cut"]), *common)
    return {"weight" if spec["form"] == "packed_linear" else "packed": layout}


def spec_bytes(spec: Spec) -> int:
    """Codes, scales, zeros and permutations: the sum of the module's buffers."""
    return sum(layout.bytes for layout in layouts_of(spec).values())


def spec_weights(spec: Spec) -> int:
    """Weights that the packed matrices stand for."""
    return sum(layout.weights for layout in layouts_of(spec).values())


def spec_code_bits(spec: Spec) -> int:
    """Bits of the codes alone, without padding."""
    return sum(layout.code_bits for layout in layouts_of(spec).values())


def average_bits(*specs: Spec) -> float:
    """8 * bytes / weights over several modules, metadata included; 0 without weights."""
    weights = sum(map(spec_weights, specs))
    return 8 * sum(map(spec_bytes, specs)) / weights if weights else 0.0
