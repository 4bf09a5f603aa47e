"""Parameters and bits of compressed modules, counted from their specs."""

from typing import Any

from camera.checkpoint.formats.format import FORMATS
from camera.moe.budget import Count, owner_of
from camera.moe.budget import count as count_tensors


def count(
    sizes: dict[str, tuple[int, int]],
    parts: dict[str, bool],
    forms: dict[str, dict[str, Any]],
) -> Count:
    """Count tensors {name: (numbers, bytes)} of a compressed model, as `camera.moe.budget.count`.

    `forms` are the specs of compressed modules: a packed module stores
    other numbers than the weights it replaces.
    """
    weights = _weights(forms)
    plain = {name: size for name, size in sizes.items() if owner_of(name, weights) is None}
    found = count_tensors(plain, parts)
    model, moe, routed = found.model, found.moe, found.routed
    biases = dict.fromkeys(weights, 0)  # which are stored as they were
    for name, (numbers, _) in sizes.items():
        path = owner_of(name, weights)
        if path is not None and name.endswith("bias"):
            biases[path] += numbers
    for path, number in weights.items():
        number += biases[path]
        model += number
        if path in parts:
            moe += number
            routed += number if parts[path] else 0
    return Count(model, moe, routed, sum(size for _, size in sizes.values()))


def bits(
    sizes: dict[str, tuple[int, int]],
    forms: dict[str, dict[str, Any]],
    total: Count,
    weights: dict[str, int],
) -> dict[str, float]:
    """Bits per weight: raw codes and stored (scales included) of the pool, and of the whole model.

    `weights` are the original numbers of weights of the pool's modules; removed ones count with 0
    bits. Where nothing is quantised all three are those of the stored weights.
    """
    model = 8 * total.bytes / total.model
    raw = {
        path: bits
        for path, spec in forms.items()
        if path in weights and (bits := FORMATS[spec["form"]].code_bits(spec)) is not None
    }
    if not raw:
        return {"raw": model, "stored": model, "model": model}
    before = sum(weights[path] for path in raw)
    stored = sum(size for name, (_, size) in sizes.items() if owner_of(name, raw) is not None)
    return {"raw": sum(raw.values()) / before, "stored": 8 * stored / before, "model": model}


def _weights(forms: dict[str, dict[str, Any]]) -> dict[str, int]:
    found = {path: FORMATS[spec["form"]].weights(spec) for path, spec in forms.items()}
    return {path: number for path, number in found.items() if number is not None}
