"""The figures over many runs: which of them can be drawn, and where they are written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.config.location import EMBEDDED
from experiments.figures.drawing import drawn
from experiments.figures.over_layers.energies import draw_shares_by_alpha
from experiments.figures.over_runs.bars import draw_bars
from experiments.figures.over_runs.curves import draw_curves
from experiments.figures.over_runs.durations import draw_durations
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
from experiments.records.energy_summary import read_energies
from experiments.records.files import RunFiles, read_json
from experiments.tables.aggregate import over_seeds
from experiments.tables.comparable import ComparableRuns, comparable_runs
from experiments.tables.names.datasets import dataset_label
from experiments.tables.names.divergence import measure_and_text
from experiments.tables.names.methods import display_name
from experiments.tables.rows import divergence_columns, less_is_better, perplexity_columns

SPEEDS = [
    Measure(f"{phase}_x", "times the original's speed", digits=2) for phase in ("prefill", "decode")
]
SPEED_OF = {"prefill_x": "Speed of reading a prompt", "decode_x": "Speed of writing"}
ORIGINAL = Reference("the original", 1.0)


@dataclass(frozen=True)
class Group:
    """Runs that can be compared, the axis of their ratio, and a name for files."""

    name: str
    ratio: Axis
    block: ComparableRuns

    @property
    def rows(self) -> pd.DataFrame:
        return self.block.runs

    def heading(self, what: str, found: pd.DataFrame) -> Heading:
        """`what` as the head, and in words what all of `found` have in common."""
        own = self.rows[self.rows["method"].isin(set(found["method"]) - {"dense"})]
        own = self.rows if own.empty else own
        identities = list(own["_identity"])
        first, data = identities[0], self.block.data
        methods = sorted(set(own["method"]))
        said = {
            model_words(self.block.model, data): True,
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
        found += _draw_energies(group, folder)
        timed = replace(group, block=replace(group.block, runs=_at_batch_sizes(group.rows)))
        for measure in SPEEDS if len(timed.rows) else ():
            found += _draw(timed, [BATCH, group.ratio], measure, ORIGINAL, folder)
    return found


def _draw_scores(group: Group, folder: Path) -> list[Path]:
    data = group.block.data
    found = []
    for measure in _measures(group.rows, data):
        reference = _dense(group.rows, measure)
        axes = [ALPHA, SAMPLES, group.ratio]
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
    texts += [
        Measure(name, f"{dataset_label(name, data)}, nats per token", digits=3)
        for name in divergence_columns(rows)
        if less_is_better(name)
    ]
    tasks = [len(i["evaluation"].get("tasks") or []) for i in rows["_identity"] if i["evaluation"]]
    own = " embedded" if data == EMBEDDED else ""
    return [*texts, Measure("average", f"average of {max(tasks, default=0)}{own} tasks, %")]


def _named(measure: Measure, data: str) -> str:
    if measure.column == "average":
        return "Average of the tasks"
    if measure_and_text(measure.column):
        text = dataset_label(measure_and_text(measure.column)[1], data)
        return f"KL divergence to the dense model on {text}"
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
        file = folder / f"{group.name}-{measure.column}-{axis.name}.png"
        if shown["asked"].nunique() > 1:
            found += drawn(draw_curves, shown, axis, measure, heading, reference, file=file)
        elif not found:  # else bars would show a part of what the curves do
            found += drawn(draw_bars, shown, measure, heading, reference, file=file)
    return found


def _head(measure: Measure, axis: Axis, group: Group) -> str:
    data = group.block.data
    if measure in SPEEDS:
        return SPEED_OF[measure.column]
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
    model = model_words(group.block.model, group.block.data)
    heading = Heading("Time to compress", f"{model} · {ratio}")
    file = folder / f"{group.name}-time.png"
    return drawn(draw_durations, pd.DataFrame(seconds), heading, file=file)


def _draw_energies(group: Group, folder: Path) -> list[Path]:
    """How α changes energies, of runs that differ in little else; of each α the first run."""
    top: dict[float, list[float]] = {}
    percents: list[float] = []
    for run in group.rows["_path"]:
        kept = read_energies(run)
        if kept is not None and kept.alpha not in top:
            top[kept.alpha] = list(np.mean([*kept.top.values()], axis=0))
            percents = kept.percents
    if len(top) < 2:
        return []
    words = group.heading("", group.rows).words
    file = folder / f"{group.name}-energy_shares.png"
    return drawn(draw_shares_by_alpha, percents, top, words, file=file)


def _seconds(row: dict) -> dict[str, float | str]:
    """The seconds of a row's first run; those of statistics whoever gathered them."""
    metrics = read_json(RunFiles(row["_path"]).metrics)
    taken = metrics["seconds"]
    used = metrics.get("cached_statistics") or {}
    gathered = taken["calibrate"] + used.get("seconds", 0.0)
    return {"method": row["method"], "calibrate": gathered, "compress": taken["compress"]}


def _dense(rows: pd.DataFrame, measure: Measure) -> Reference | None:
    if measure.column not in rows:
        return None
    dense = rows[(rows["method"] == "dense") & rows[measure.column].notna()]
    if dense.empty:
        return None
    level = float(dense[measure.column].iloc[0])
    return Reference(display_name("dense"), level, float(errors_of(dense, measure).iloc[0]))


def _common(told: list[str]) -> str:
    """What all say that say anything, if they say the same."""
    said = {*told} - {""}
    return said.pop() if len(said) == 1 else ""


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


def _groups(means: pd.DataFrame) -> Iterator[Group]:
    """The blocks of comparable runs, as in tables; where a study has several, they are numbered."""
    seen: Counter[str] = Counter()
    for block in comparable_runs(means):
        if (block.runs["method"] != "dense").any():
            name = re.sub(r"[^\w.+-]+", "_", f"{block.model}-{block.study}")
            seen[name] += 1
            number = f"-{seen[name]}" if seen[name] > 1 else ""
            yield Group(f"{name}{number}", BITS if block.of is None else SPARSITY[block.of], block)


def _at_batch_sizes(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each batch size whose speed a row's runs measured, the size part of its identity.

    In `read_runs` the speeds of the first size are `prefill_x`, of another `prefill_16_x`.
    """
    found = []
    for row in rows.to_dict("records"):
        sizes = read_json(RunFiles(row["_path"]).metrics).get("speed") or {}
        for number, size in enumerate(sizes):
            of_size = "" if number == 0 else f"{size}_"
            speeds = {
                f"{phase}_x{kind}": row.get(f"{phase}_{of_size}x{kind}", np.nan)
                for phase in ("prefill", "decode")
                for kind in ("", "_std")
            }
            identity = row["_identity"] | {"batch": int(size)}
            found.append(row | speeds | {"batch": float(size), "_identity": identity})
    return pd.DataFrame(found, columns=None if found else rows.columns)
