"""The figures over many runs: which of them can be drawn, and where they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.figures.curves import draw_curves
from experiments.figures.pareto import draw_pareto
from experiments.figures.points import ALPHA, BITS, SAMPLES, SPARSITY, Axis, Measure, points
from experiments.records.files import RunFiles, read_json
from experiments.records.identity import differing_settings, measurement_key
from experiments.tables.aggregate import over_seeds
from experiments.tables.rows import perplexity_columns

AVERAGE = Measure("average", "average of the tasks, %")
SPEEDS = [
    Measure(f"{phase}_x", f"{phase}, times as fast as the original")
    for phase in ("prefill", "decode")
]


@dataclass(frozen=True)
class Comparable:
    """Rows of one model that were measured in the same way."""

    name: str
    title: str
    rows: pd.DataFrame


def draw_comparisons(runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw to the folder whatever two or more of these runs have to show; the PNGs."""
    done = runs[runs["status"] == "done"] if len(runs) else runs
    drawn: list[Path] = []
    for group in _comparable(over_seeds(done)):
        drawn += _draw_scores(group, folder)
        pareto = folder / f"{group.name}-average-size.png"
        drawn += filter(None, [draw_pareto(group.rows, group.title, pareto)])
    for group in _comparable(over_seeds(_at_batch_sizes(done))):
        for measure in SPEEDS:
            axes = [*_sparsities(group.rows), BITS]
            drawn += _draw(group, axes, measure, ("the original", 1.0), folder)
    return drawn


def _draw_scores(group: Comparable, folder: Path) -> list[Path]:
    axes = [*_sparsities(group.rows), BITS, ALPHA, SAMPLES]
    measures = [
        Measure(name, f"perplexity, {name}", log=True) for name in perplexity_columns(group.rows)
    ]
    drawn = []
    for measure in [*measures, AVERAGE]:
        drawn += _draw(group, axes, measure, _dense(group.rows, measure), folder)
    return drawn


def _draw(
    group: Comparable,
    axes: list[Axis],
    measure: Measure,
    reference: tuple[str, float] | None,
    folder: Path,
) -> list[Path]:
    drawn = []
    for axis in axes:
        found = points(group.rows, axis, measure)
        if len(found):
            name = f"{group.name}-{measure.column}-{_axis_name(axis, axes)}.png"
            drawn.append(draw_curves(found, axis, measure, group.title, folder / name, reference))
    return drawn


def _axis_name(axis: Axis, axes: list[Axis]) -> str:
    alone = sum(other.name == axis.name for other in axes) == 1
    return axis.name if alone else axis.column


def _sparsities(rows: pd.DataFrame) -> list[Axis]:
    return [axis for of, axis in SPARSITY.items() if (rows["sparsity_of"] == of).any()]


def _dense(rows: pd.DataFrame, measure: Measure) -> tuple[str, float] | None:
    if measure.column not in rows:
        return None
    level = rows.loc[rows["method"] == "dense", measure.column].dropna()
    return ("dense", float(level.iloc[0])) if len(level) else None


def _comparable(rows: pd.DataFrame) -> Iterator[Comparable]:
    """The rows by model and measurement; where a model has several, numbered and told apart."""
    if rows.empty:
        return
    for model, own in rows.groupby("model", sort=False):
        name = re.sub(r"[^\w.+-]+", "_", str(model))
        parts = [part for _, part in own.groupby(own["_identity"].map(_measured), sort=False)]
        parts.sort(key=len, reverse=True)
        firsts = [part["_identity"].iloc[0] for part in parts]
        measured = [{"evaluation": _counted(first["evaluation"])} for first in firsts]
        told = differing_settings([("",)] * len(parts), measured)
        for number, (part, settings) in enumerate(zip(parts, told, strict=True), start=1):
            title = ", ".join(filter(None, (str(model), settings.replace("evaluation.", ""))))
            yield Comparable(name if number == 1 else f"{name}-{number}", title, part)


def _measured(identity: dict[str, Any]) -> str:
    return repr(measurement_key(identity))


def _counted(evaluation: dict[str, Any]) -> dict[str, Any]:
    """With the number of tasks instead of their names, which are too long for a title."""
    return {key: len(value) if key == "tasks" else value for key, value in evaluation.items()}


def _at_batch_sizes(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each batch size whose speed a run measured, the size part of its identity."""
    rows = []
    for row in runs.to_dict("records"):
        batches = read_json(RunFiles(row["_path"]).metrics).get("speed") or {}
        for size, phases in batches.items():
            speeds = {f"{phase}_x": part["ratio"] for phase, part in phases.items()}
            rows.append(row | speeds | {"_identity": row["_identity"] | {"batch": int(size)}})
    return pd.DataFrame(rows)
