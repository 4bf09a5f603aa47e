"""The figures over many runs: which of them can be drawn, and where they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from experiments.config.location import EMBEDDED
from experiments.figures.drawing import drawn
from experiments.figures.over_runs.bars import draw_bars
from experiments.figures.over_runs.curves import draw_curves
from experiments.figures.over_runs.durations import PHASES, draw_durations
from experiments.figures.over_runs.points import (
    ALPHA,
    BATCH,
    BITS,
    SAMPLES,
    SPARSITY,
    Axis,
    Measure,
    Reference,
    errors_of,
    points,
)
from experiments.figures.over_runs.sizes import draw_sizes
from experiments.figures.words import (
    Heading,
    calibration_words,
    evaluation_words,
    model_words,
    ratio_words,
)
from experiments.records.files import RunFiles, read_json
from experiments.records.identity import measurement_key
from experiments.tables.aggregate import over_seeds
from experiments.tables.names.datasets import dataset_label
from experiments.tables.names.methods import display_name
from experiments.tables.rows import perplexity_columns
from experiments.tables.studies import with_studies

SPEEDS = [
    Measure(f"{phase}_x", f"{label}, times the original's speed", digits=2)
    for phase, label in (("prefill", "reading a prompt"), ("decode", "writing"))
]
ORIGINAL = Reference("the original", 1.0)


@dataclass(frozen=True)
class Group:
    """Rows of one study of one model that were measured in the same way, dense among them."""

    name: str
    study: str
    rows: pd.DataFrame

    def heading(self, what: str, found: pd.DataFrame) -> Heading:
        """`what` as the head, and in words what all of `found` have in common."""
        own = self.rows[self.rows["method"].isin(set(found["method"]) - {"dense"})]
        own = self.rows if own.empty else own
        identities = list(own["_identity"])
        first, data = identities[0], own["data"].iloc[0]
        methods = sorted(set(own["method"]))
        said = {
            model_words(own["model"].iloc[0], data): True,
            display_name(methods[0]): len(methods) == 1,
            _common([ratio_words(i["method"]) for i in identities]): True,
            _common([_alpha(i) for i in identities]): len(methods) == 1,
            _common([calibration_words(i.get("calibration"), data) for i in identities]): True,
            evaluation_words(first["evaluation"] or {}): True,
            _bars(found): True,
        }
        return Heading(what, " · ".join(part for part, tell in said.items() if tell and part))


def draw_comparisons(runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw to the folder whatever two or more of these runs have to show; the PNGs.

    A figure that can't be drawn is logged, and the rest goes on.
    """
    done = runs[runs["status"] == "done"] if len(runs) else runs
    found: list[Path] = []
    for group in _groups(over_seeds(done)):
        found += _draw_scores(group, folder)
        found += _draw_durations(group, folder)
    for group in _groups(over_seeds(_at_batch_sizes(done))):
        for measure in SPEEDS:
            found += _draw(group, [BATCH, *_ratios(group.rows)], measure, ORIGINAL, folder)
    return found


def _draw_scores(group: Group, folder: Path) -> list[Path]:
    data = group.rows["data"].iloc[0]
    found = []
    for measure in _measures(group.rows, data):
        reference = _dense(group.rows, measure)
        axes = [ALPHA, SAMPLES, *_ratios(group.rows)]
        found += _draw(group, axes, measure, reference, folder)
        file = folder / f"{group.name}-{measure.column}-size.png"
        heading = group.heading(f"{_named(measure, data)} by size", group.rows)
        found += drawn(draw_sizes, group.rows, measure, heading, file=file)
    return found


def _measures(rows: pd.DataFrame, data: str) -> list[Measure]:
    texts = [
        Measure(name, f"perplexity, {dataset_label(name, data)}", log=True, least=1, digits=2)
        for name in perplexity_columns(rows)
    ]
    tasks = [len(i["evaluation"].get("tasks") or []) for i in rows["_identity"] if i["evaluation"]]
    own = " embedded" if data == EMBEDDED else ""
    return [*texts, Measure("average", f"average of {max(tasks, default=0)}{own} tasks, %")]


def _named(measure: Measure, data: str) -> str:
    if measure.column == "average":
        return "Average of the tasks"
    return f"Perplexity of {dataset_label(measure.column, data)}"


def _draw(
    group: Group, axes: list[Axis], measure: Measure, reference: Reference | None, folder: Path
) -> list[Path]:
    found: list[Path] = []
    for axis in axes:
        shown = points(group.rows, axis, measure)
        if shown.empty:
            continue
        heading = group.heading(_head(measure, axis, group), shown)
        file = folder / f"{group.name}-{measure.column}-{_axis_name(axis, axes)}.png"
        if shown["asked"].nunique() > 1:
            found += drawn(draw_curves, shown, axis, measure, heading, reference, file=file)
        elif not found:  # else bars would show a part of what the curves do
            found += drawn(draw_bars, shown, measure, heading, reference, file=file)
    return found


def _head(measure: Measure, axis: Axis, group: Group) -> str:
    data = group.rows["data"].iloc[0]
    if measure in SPEEDS:
        return f"Speed of {measure.label.partition(',')[0]}"
    over = {ALPHA: " by α", SAMPLES: " by calibration size"}.get(axis, "")
    return f"{_named(measure, data)}{over}"


def _draw_durations(group: Group, folder: Path) -> list[Path]:
    compressed = group.rows[group.rows["method"] != "dense"]
    if compressed.empty:
        return []
    kinds = [ratio_words(identity["method"]) for identity in compressed["_identity"]]
    by_ratio = compressed.assign(_ratio=kinds).groupby("_ratio")
    ratio = by_ratio["method"].nunique().idxmax()
    rows = by_ratio.get_group(ratio).sort_values("settings", key=lambda told: told.str.len())
    rows = rows.drop_duplicates("method")
    seconds = [_seconds(row) for row in rows.to_dict("records")]
    model = model_words(str(rows["model"].iloc[0]), str(rows["data"].iloc[0]))
    heading = Heading("Time to compress", f"{model} · {ratio}")
    file = folder / f"{group.name}-time.png"
    return drawn(draw_durations, pd.DataFrame(seconds), heading, file=file)


def _seconds(row: dict) -> dict[str, float | str]:
    """The seconds of a row's first run; those of statistics whoever gathered them."""
    taken = read_json(RunFiles(row["_path"]).metrics)["seconds"]
    found = {phase: taken[phase] for phase in PHASES}
    found["calibrate"] = max(found["calibrate"], 60 * row["minutes"] - found["compress"])
    return {"method": row["method"]} | found


def _axis_name(axis: Axis, axes: list[Axis]) -> str:
    alone = sum(other.name == axis.name for other in axes) == 1
    return axis.name if alone else axis.column


def _ratios(rows: pd.DataFrame) -> list[Axis]:
    return [*(axis for of, axis in SPARSITY.items() if (rows["sparsity_of"] == of).any()), BITS]


def _dense(rows: pd.DataFrame, measure: Measure) -> Reference | None:
    if measure.column not in rows:
        return None
    dense = rows[(rows["method"] == "dense") & rows[measure.column].notna()]
    if dense.empty:
        return None
    level = float(dense[measure.column].iloc[0])
    return Reference(display_name("dense"), level, float(errors_of(dense, measure).iloc[0]))


def _common(told: list[str]) -> str:
    """What all say, if they say the same."""
    return told[0] if len(set(told)) == 1 else ""


def _alpha(identity: dict) -> str:
    alpha = identity["method"].get("alpha")
    return "" if alpha is None else f"α\u00a0=\u00a0{alpha:g}"


def _bars(found: pd.DataFrame) -> str:
    """What the error bars of points are; empty where there are none."""
    if "error" not in found or found["error"].isna().all():
        return ""
    several = int(found["seeds"].max())
    if several < 2:
        return "bars: standard error"
    return f"bars: standard deviation over {several} seeds, standard error of a single one"


def _groups(rows: pd.DataFrame) -> Iterator[Group]:
    """The rows by model, study and measurement; where a study has several, they are numbered."""
    if rows.empty:
        return
    rows = with_studies(rows)
    dense = rows["method"] == "dense"
    studies = dict.fromkeys(study for own in rows["studies"] for study in own)
    for model in dict.fromkeys(rows["model"]):
        for study in studies:
            within = rows["studies"].map(partial(_is_within, study=study))
            own = rows[(rows["model"] == model) & (within | dense)]
            ways = own["_identity"].map(lambda identity: repr(measurement_key(identity)))
            parts = [part for _, part in own.groupby(ways, sort=False)]
            parts = [part for part in parts if (part["method"] != "dense").any()]
            parts.sort(key=len, reverse=True)
            for number, part in enumerate(parts, start=1):
                name = re.sub(r"[^\w.+-]+", "_", f"{model}-{study}")
                yield Group(name if number == 1 else f"{name}-{number}", study, part)


def _is_within(studies: list[str], study: str) -> bool:
    return study in studies


def _at_batch_sizes(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each batch size whose speed a run measured, the size part of its identity."""
    rows = []
    for row in runs.to_dict("records"):
        batches = read_json(RunFiles(row["_path"]).metrics).get("speed") or {}
        for size, phases in batches.items():
            speeds = {f"{phase}_x": part["ratio"] for phase, part in phases.items()}
            identity = row["_identity"] | {"batch": int(size)}
            rows.append(row | speeds | {"batch": float(size), "_identity": identity})
    return pd.DataFrame(rows)
