"""What a run's result depends on: what tells two runs apart, and what makes them comparable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

# What every run has of its own, or what the table shows in columns of their own.
UNNAMED = ("model", "method.name", "method.sparsity", "method.sparsity_of", "method.bits")


def measurement_key(identity: dict[str, Any]) -> dict[str, Any]:
    """How a run was measured and on which model: runs that agree in it can be compared.

    The seed isn't part of it: it draws what a method is calibrated on, not what is measured.
    """
    keys = ("camera", "model", "dtype", "evaluation", "data")
    return {key: identity.get(key) for key in keys}


def without_seed(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity that runs with different seeds share."""
    method = {key: value for key, value in identity["method"].items() if key != "seed"}
    rest = {key: value for key, value in identity.items() if key != "seed"}
    return rest | {"method": method}


def differing_settings(
    kinds: Sequence[tuple[str, ...]],
    identities: Sequence[dict[str, Any]],
    *,
    leave_usual: bool = False,
) -> list[str]:
    """For each identity the settings in which it differs from another one of its kind.

    A kind is what is known of a run anyway, such as its model and method. `leave_usual` leaves out
    the value that more identities of a kind have than any other.
    """
    flat = [_flatten(identity) for identity in identities]
    values: dict[tuple, Counter[str]] = {}
    different = {
        (kind, repr(settings)): settings for kind, settings in zip(kinds, flat, strict=True)
    }
    for (kind, _), settings in different.items():
        for key, value in settings.items():
            values.setdefault((kind, key), Counter())[repr(value)] += 1

    def told(seen: Counter[str], value: Any) -> bool:
        (most, count), *others = seen.most_common(2)
        usual = leave_usual and repr(value) == most and others and count > others[0][1]
        return len(seen) > 1 and not usual

    return [
        ", ".join(
            f"{key.removeprefix('method.')}={_short(value)}"
            for key, value in settings.items()
            if key not in UNNAMED and told(values[kind, key], value)
        )
        for kind, settings in zip(kinds, flat, strict=True)
    ]


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def _short(value: Any) -> str:
    return "+".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
