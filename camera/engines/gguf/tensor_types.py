"""A bit plan as llama-quantize's list of types: `--tensor-type-file`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from camera.checkpoint.source import resolve_model
from camera.engines.gguf.architectures import architecture_of
from camera.engines.plain import WIDTH_MULTIPLE
from camera.method import LayerPlan, Plan
from camera.moe.pool import LayerPool
from camera.runtime.errors import CameraError
from camera.runtime.files import published, refuse_existing
from camera.streaming.skeleton import MetaModel

log = logging.getLogger("camera")
TYPES = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 7: "q8_0", 8: "q8_0"}
SMALL_BLOCKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def tensor_types(checkpoint: str | Path, out: str | Path, trust_remote_code: bool = False) -> Path:
    """Write the types of a quantised checkpoint's experts, layer by layer; returns `out`.

    A line is a regular expression of tensor names and a type, such as
    `blk\\.3\\.ffn_(gate|up)_exps=q3_k`. Bits become the K-quant of as many bits (7 and 8: q8_0),
    and where a row is no multiple of 256 what llama-quantize takes in its place, which the log
    says. Raises CameraError for plans of several bits in a layer, and models that GGUF can't hold.
    """
    out, folder = Path(out).expanduser(), resolve_model(str(checkpoint))
    refuse_existing(out)
    model = MetaModel(folder, trust_remote_code=trust_remote_code)
    architecture_of(model.config)  # refuses what can't be written
    plan, lines, replaced = Plan.load(folder), [], {}
    widths = widest(model)
    for index, pool in sorted(model.budget.layers.items()):
        wanted = TYPES[bits_of_layer(index, plan.layers.get(index))]
        for tensors, columns in _tensors(pool, model.budget.hidden, widths):
            found = fitting(wanted, columns)
            lines.append(rf"blk\.{index}\.{tensors}={found}")
            if found != wanted:
                replaced.setdefault((tensors, columns, wanted, found), []).append(index)
    for (tensors, columns, wanted, found), layers in replaced.items():
        log.warning(
            "%s of layers %s: rows of %d don't fit %s, so that llama.cpp stores %s.",
            tensors,
            ", ".join(map(str, layers)),
            columns,
            wanted,
            found,
        )
    with published(out) as partial:
        partial.write_text("\n".join(lines) + "\n")
    return out


def bits_of_layer(index: int, layer: LayerPlan | None) -> int:
    """The one number of bits of a layer's experts; CameraError where there are several."""
    experts = getattr(layer, "experts", None)
    if layer is None or layer.kind != "bits" or experts is None:
        raise CameraError(f"the plan says no bits of layer {index}: quantise the model first.")
    found = {int(b) for e in experts for part in (e.gate, e.up, e.down) for b in part.unique()}
    if len(found) != 1 or not found <= TYPES.keys():
        raise CameraError(
            f"layer {index} has {', '.join(map(str, sorted(found)))} bits, and llama.cpp takes one "
            "type, of 2 to 8 bits, for all experts of a layer: use layerwise_bits, gptq or rtn."
        )
    return found.pop()


def fitting(kind: str, columns: int) -> str:
    """What llama-quantize stores rows of so many columns in, where this type is asked for."""
    if columns % 32:
        return "f16"
    return kind if columns % 256 == 0 else SMALL_BLOCKS.get(kind, kind)


def widest(model: MetaModel) -> dict[bool, int]:
    """Width of routed (True) and of other experts in a GGUF: one for the whole model."""
    found: dict[bool, int] = {}
    for pool in model.budget.layers.values():
        for width, routed in zip(pool.widths, pool.routed, strict=True):
            found[routed] = max(found.get(routed, 0), -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)
    return found


def _tensors(pool: LayerPool, hidden: int, widths: dict[bool, int]) -> Iterator[tuple[str, int]]:
    """(expression of names, columns) of every kind of tensor of a layer's experts."""
    for routed in sorted(set(pool.routed)):
        suffix = "_exps" if routed else "_shexp" if any(pool.routed) else r"\.weight"
        yield f"ffn_(gate|up){suffix}", hidden
        yield f"ffn_down{suffix}", widths[routed]
