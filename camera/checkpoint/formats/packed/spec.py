"""Specs of packed modules in config.json, and the bytes that follow from them.

A spec holds the sizes of a module and the bit segments of its matrices. Every tensor's size is a
pure function of it, so that a budget can be solved before anything is quantised. Biases don't
count.
"""

from camera.checkpoint.formats.format import FORMATS, Spec
from camera.checkpoint.formats.packed.segments import BitSegments


def experts_spec(
    hidden: int,
    widths: list[int],
    gate_up: BitSegments,
    down: BitSegments,
    group_size: int | None,
    sym: bool,
) -> Spec:
    """Routed experts; gate and up have the same segments. `down` holds what differs from these."""
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
    hidden: int,
    width: int,
    gate_up: BitSegments,
    down: BitSegments,
    group_size: int | None,
    sym: bool,
) -> Spec:
    """A shared expert or dense FFN: segments of one expert."""
    spec = experts_spec(hidden, [width], gate_up, down, group_size, sym)
    return {**spec, "form": "packed_mlp"}


def linear_spec(
    out_features: int, in_features: int, cut: BitSegments, group_size: int | None, sym: bool
) -> Spec:
    """One weight [out, in]; `BitSegments.of("rows", [[bits] * out])` for uniform bits."""
    return {
        "form": "packed_linear",
        "shape": [out_features, in_features],
        "group_size": group_size,
        "sym": sym,
        "cut": cut.json(),
    }


def router_spec(
    out_features: int, in_features: int, cut: BitSegments, group_size: int | None, sym: bool
) -> Spec:
    """The weight [experts, hidden] of a router that is a module of its own."""
    return {
        **linear_spec(out_features, in_features, cut, group_size, sym),
        "form": "packed_router",
    }


def projections(spec: Spec) -> dict[str, Spec]:
    """The three linear layers of a packed MLP, as specs of their own."""
    hidden, (width,) = spec["hidden"], spec["widths"]
    gate_up, down = segments_of(spec)
    common = spec["group_size"], spec["sym"]
    return {
        "gate_proj": linear_spec(width, hidden, gate_up, *common),
        "up_proj": linear_spec(width, hidden, gate_up, *common),
        "down_proj": linear_spec(hidden, width, down, *common),
    }


def segments_of(spec: Spec) -> tuple[BitSegments, BitSegments]:
    """Segments of gate and up, and of down, of a packed module."""
    gate_up = spec["gate_up"]
    return BitSegments.from_json(gate_up), BitSegments.from_json({**gate_up, **spec["down"]})


def spec_bytes(spec: Spec) -> int:
    """Codes, scales, zeros and permutations: the sum of the module's buffers."""
    return FORMATS[spec["form"]].nbytes(spec)


def spec_weights(spec: Spec) -> int:
    """Number of original weights that the packed matrices replace."""
    return FORMATS[spec["form"]].weights(spec)


def spec_code_bits(spec: Spec) -> int:
    """Bits of the codes alone, without padding."""
    return FORMATS[spec["form"]].code_bits(spec)
