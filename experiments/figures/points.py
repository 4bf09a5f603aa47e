"""Runs as points of lines: the axes, and the runs of one line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.identity import differing_settings


@dataclass(frozen=True)
class Axis:
    """What runs differ in along a line: a column of theirs, and the key that asks for it."""

    name: str
    column: str
    key: str
    label: str
    log: bool = False


@dataclass(frozen=True)
class Measure:
    """What is measured of runs: a column of theirs."""

    column: str
    label: str
    log: bool = False


SPARSITY = {
    "moe": Axis("sparsity", "sparsity_moe", "method.sparsity", "% of the experts removed"),
    "model": Axis("sparsity", "sparsity_model", "method.sparsity", "% of the model removed"),
    "routed": Axis(
        "sparsity", "sparsity_routed", "method.sparsity", "% of the routed experts removed"
    ),
}
BITS = Axis("bits", "bits_stored", "method.bits", "bits per weight of the experts, with scales")
ALPHA = Axis("alpha", "alpha", "method.alpha", "α (0: sum of squares, 1: maximum)")
SAMPLES = Axis("samples", "samples", "calibration.samples", "calibration samples", log=True)
RATIOS = (*SPARSITY.values(), BITS)


def points(rows: pd.DataFrame, axis: Axis, measure: Measure) -> pd.DataFrame:
    """The points of one figure: x, y, error, method, label, variant; none if it would show none.

    A line is the rows of a method that differ in nothing but what the axis shows; `variant`
    numbers the lines of a method. Over a ratio these are the longest lines of each method, so that
    a setting tried at one ratio isn't in the way; else all lines of two points or more. `error`
    is the standard deviation over seeds, else the standard error of the measure, else NaN.
    """
    if not {axis.column, measure.column} <= {*rows.columns}:
        return pd.DataFrame()
    asked = rows["_identity"].map(partial(_asked, key=axis.key))
    kept = rows[asked & rows[axis.column].notna() & rows[measure.column].notna()]
    if kept.empty:
        return pd.DataFrame()
    found = pd.DataFrame(
        {
            "x": kept[axis.column].astype(float),
            "y": kept[measure.column].astype(float),
            "error": _errors(kept, measure),
            "method": kept["method"],
            "ratio": [_ratio(axis, row) for row in kept.to_dict("records")],
            "rest": [_without(identity, axis.key) for identity in kept["_identity"]],
        }
    )
    found = found.assign(line=found["method"] + " " + found["rest"].map(repr))
    found = found[found["line"].isin(_lines_worth_drawing(found, axis in RATIOS))]
    if found["x"].nunique() < 2:
        return pd.DataFrame()
    return _labelled(found).sort_values(["method", "variant", "x"]).reset_index(drop=True)


def _errors(rows: pd.DataFrame, measure: Measure) -> pd.Series:
    missing = pd.Series(np.nan, index=rows.index)
    spread = rows.get(f"{measure.column}_std", missing)
    return spread.fillna(rows.get(f"{measure.column}_se", missing)).astype(float)


def _ratio(axis: Axis, row: dict[str, Any]) -> str:
    """How much is removed, or what is left, where the axis doesn't show it."""
    if axis in RATIOS:
        return ""
    return f"{row['sparsity']:g} %" if pd.notna(row["sparsity"]) else f"{row['bits']:g} bits"


def _asked(identity: dict[str, Any], key: str) -> bool:
    group, name = key.split(".")
    return identity.get(group, {}).get(name) is not None


def _without(identity: dict[str, Any], key: str) -> dict[str, Any]:
    group, name = key.split(".")
    part = {k: value for k, value in identity.get(group, {}).items() if k != name}
    return identity | {group: part}


def _lines_worth_drawing(found: pd.DataFrame, over_ratio: bool) -> pd.Index:
    lines = found.groupby("line", sort=False)
    lengths, methods = lines["x"].nunique(), lines["method"].first()
    longest = lengths.groupby(methods).transform("max")
    return lengths.index[lengths == longest if over_ratio else lengths > 1]


def _labelled(found: pd.DataFrame) -> pd.DataFrame:
    kinds = [(method,) for method in found["method"]]
    settings = differing_settings(kinds, list(found["rest"]), leave_usual=True)
    settings = [told.replace("calibration.", "") for told in settings]
    parts = zip(found["method"], found["ratio"], settings, strict=True)
    labels = [", ".join(filter(None, (" ".join(filter(None, p[:2])), p[2]))) for p in parts]
    found = found.assign(label=labels).drop(columns=["rest", "ratio"])
    # the usual variant has least to say
    plainest = found.sort_values("label", key=lambda label: label.str.len(), kind="stable")
    variants = plainest.groupby("method")["line"].transform(lambda line: line.factorize()[0])
    return found.assign(variant=variants)
