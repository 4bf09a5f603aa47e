"""Settings that have a new name or value: plain data, for the sentence that refuses the old one."""

from __future__ import annotations

from typing import Any

KEYS: dict[str, dict[str, str]] = {  # group: old key -> new key
    "method": {
        "term": "score",
        "score_by": "score",
        "norm": "score",
        "gate": "routing_weights",
        "errors": "token_weights",
        "percdamp": "damping",
        "limit": "max_subsets",
        "tokens": "sample_tokens",
        "loss_of": "loss_norm",
    },
    "evaluation": {"unpack": "dequantize"},
}
VALUES: dict[str, dict[str, dict[str, str]]] = {  # group: new key -> old value -> new value
    "method": {
        "score": {"joint": "fisher", "relative": "hidden_share", "sum": "weight_sum"},
        "rank_scope": {"model": "global"},
        "token_weights": {"absolute": "uniform"},
    },
    "memory": {"experts": {"layer": "ram", "visit": "disk"}},
}
OF_KEY = {("norm", "product"): "weight_product"}  # where another method's old value stays valid


def renaming(group: str, key: str, value: Any = None) -> str | None:
    """The sentence that names the new key or value, None where neither was renamed.

    For a key that is refused, or a value of it: an old key may be a valid one of another method.
    """
    new_key = KEYS.get(group, {}).get(key, key)
    values = VALUES.get(group, {}).get(new_key, {})
    new_value = OF_KEY.get((key, str(value)), values.get(str(value)))
    if new_key == key and new_value is None:
        return None
    old, new = f"{group}.{key}", f"{group}.{new_key}"
    if new_value is not None:
        return f"{old}={value} is now {new}={new_value}."
    return f"{old} is now {new}."
