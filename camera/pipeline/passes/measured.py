"""What is measured of each layer while a model is compressed: one number of a kind and layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any

from camera.calibration.statistics import LayerStatistics
from camera.method import Method
from camera.moe.pool import KeptRows


def of_layer(
    method: Method,
    seen: LayerStatistics | None,
    kept: KeptRows | None,
    widths: tuple[int, int],
    report: Mapping[str, Any],
) -> dict[str, float]:
    """By name the numbers of a layer of the pool, whose width was and is the sum `widths`.

    `kept_share` is the share of its micro-experts that stays; `energy_removed` the share of its
    energy that goes with the others; `bits` are stored per weight, scales included; `output_error`
    is the mean of |Wx - Qx|^2 / |Wx|^2 over its quantised matrices; `refit_missing` is the share of
    the removed squared output that a refit doesn't bring back.
    """
    before, after = widths
    found: dict[str, float] = {}
    if before and (hasattr(method, "sparsity") or after != before):
        found["kept_share"] = after / before
    alpha = getattr(method, "alpha", None)
    if kept is not None and alpha is not None and hasattr(seen, "energy"):
        energy_N = seen.energy(alpha).cpu()
        parts = zip(energy_N.split(seen.widths), _rows_in_order(kept), strict=True)
        stays = sum(energy_W[rows_W].sum().item() for energy_W, rows_W in parts)
        whole = energy_N.sum().item()
        found["energy_removed"] = max(1 - stays / whole, 0.0) if whole else 0.0
    stored, errors = report.get("bits"), list(_errors(report.get("experts")))
    if isinstance(stored, dict) and "stored" in stored:
        found["bits"] = stored["stored"]
    if errors:
        found["output_error"] = mean(errors)
    if "missing" in report:
        found["refit_missing"] = report["missing"]
    return found


def _rows_in_order(kept: KeptRows) -> list[Any]:
    return [rows_W.cpu() for experts in kept.values() for rows_W in experts]


def _errors(experts: Any) -> Iterator[float]:
    """Those that `camera.quantization.layer` reports."""
    for part in experts.values() if isinstance(experts, dict) else ():
        for name in ("gate_up", "down"):
            if name in part:
                yield part[name]["error_all"]
