"""Runs as points of lines: the axes, and the runs of one line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures.words import SHARE_OF
from experiments.tables.comparable import settings_told
from experiments.tables.names.methods import display_name


@dataclass(frozen=True)
class Axis:
    """What runs differ in along a line: a column of theirs, and the key that asks for it."""

    name: str
    column: str
    key: str
    label: str
    log: bool = False
    from_zero: bool = False  # what the dense model has of it is 0
    least: float = 0.0  # that it spans

    @property
    def is_ratio(self) -> bool:
        """Whether it says how much a method removes or leaves."""
        return self.key in ("method.sparsity", "method.bits")


@dataclass(frozen=True)
class Measure:
    """What is measured of runs: a column of theirs."""

    column: str
    label: str
    log: bool = False
    least: float = 0.0  # where bars of it begin
    digits: int = 1

    def text(self, value: float) -> str:
        """The value as it is printed."""
        return f"{value:,.{self.digits}f}"


@dataclass(frozen=True)
class Reference:
    """What runs are compared with: its name, value and error (NaN where none is known)."""

    name: str
    level: float
    error: float = np.nan


SPARSITY = {
    of: Axis(
        "sparsity",
        f"sparsity_{of}",
        "method.sparsity",
        f"% {SHARE_OF[of]} removed",
        from_zero=True,
    )
    for of in ("moe", "model", "routed")
}
BITS = Axis(
    "bits", "bits_stored", "method.bits", "bits per weight of the experts, with scales", least=0.5
)
ALPHA = Axis("alpha", "alpha", "method.alpha", "α (0: sum of squares, 1: maximum)")
SAMPLES = Axis("samples", "samples", "calibration.samples", "calibration samples", log=True)
BATCH = Axis("batch", "batch", "batch", "sequences at once", log=True)


def points(rows: pd.DataFrame, axis: Axis, measure: Measure) -> pd.DataFrame:
    """The points of one figure: x, asked, y, error, method, label, variant; none if it shows none.

    A line is the rows of a method that differ in nothing but what the axis shows; `variant`
    numbers the lines of a method, `asked` is the x that was asked for. Over a ratio these are the
    longest lines of each method, so that a setting tried at one ratio isn't in the way; else all
    lines of two points or more. Where one ratio was asked of all, two rows or more are points.
    `error` is the standard deviation over seeds, else the standard error of the measure, else NaN.
    """
    if not {axis.column, measure.column} <= {*rows.columns}:
        return pd.DataFrame()
    asked = rows["_identity"].map(partial(_asked, key=axis.key))
    kept = rows[asked.notna() & rows[axis.column].notna() & rows[measure.column].notna()]
    if kept.empty:
        return pd.DataFrame()
    found = pd.DataFrame(
        {
            "x": kept[axis.column].astype(float),
            "asked": asked[kept.index].astype(float),
            "y": kept[measure.column].astype(float),
            "error": errors_of(kept, measure),
            "seeds": kept["n"],
            "method": kept["method"],
            "data": kept["data"],
            "ratio": ["" if axis.is_ratio else ratio_of(row) for row in kept.to_dict("records")],
            "rest": [_without(identity, axis.key) for identity in kept["_identity"]],
        }
    )
    found = found.assign(line=found["method"] + " " + found["rest"].map(repr))
    found = found[found["line"].isin(_lines_worth_drawing(found, axis))]
    if found["asked"].nunique() < 2 and not (axis.is_ratio and len(found) > 1):
        return pd.DataFrame()
    return _labelled(found).sort_values(["method", "variant", "x"]).reset_index(drop=True)


def errors_of(rows: pd.DataFrame, measure: Measure) -> pd.Series:
    """Standard deviations over seeds, else standard errors, else NaN."""
    missing = pd.Series(np.nan, index=rows.index)
    spread = rows.get(f"{measure.column}_std", missing)
    return spread.fillna(rows.get(f"{measure.column}_se", missing)).astype(float)


def ratio_of(row: dict[str, Any]) -> str:
    """How much a row removes, or what it leaves."""
    if pd.notna(row["sparsity"]):
        return f"{row['sparsity']:.3g} %"
    return f"{row['bits']:g} bits" if pd.notna(row["bits"]) else ""


def _asked(identity: dict[str, Any], key: str) -> float | None:
    group, _, name = key.rpartition(".")
    return (identity.get(group, {}) if group else identity).get(name)


def _without(identity: dict[str, Any], key: str) -> dict[str, Any]:
    group, _, name = key.rpartition(".")
    part = identity.get(group, {}) if group else identity
    rest = {k: value for k, value in part.items() if k != name}
    return identity | {group: rest} if group else rest


def _lines_worth_drawing(found: pd.DataFrame, axis: Axis) -> pd.Index:
    lines = found.groupby("line", sort=False)
    lengths, methods = lines["asked"].nunique(), lines["method"].first()
    longest = lengths.groupby(methods).transform("max")
    return lengths.index[lengths == longest if axis.is_ratio else lengths > 1]


def _labelled(found: pd.DataFrame) -> pd.DataFrame:
    rest = found.rename(columns={"rest": "_identity"})
    settings = map(_readable, settings_told(rest, leave_usual=True))
    parts = zip(map(display_name, found["method"]), found["ratio"], settings, strict=True)
    labels = [", ".join(filter(None, (" ".join(filter(None, p[:2])), p[2]))) for p in parts]
    found = found.assign(label=labels).drop(columns=["rest", "ratio", "data"])
    # the usual variant has least to say
    plainest = found.sort_values("label", key=lambda label: label.str.len(), kind="stable")
    variants = plainest.groupby("method")["line"].transform(lambda line: line.factorize()[0])
    return found.assign(variant=variants)


def _readable(settings: str) -> str:
    return re.sub(r"\balpha=(\S+?)(?=,|$)", lambda told: f"α={float(told[1]):g}", settings)
