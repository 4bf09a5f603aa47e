"""Runs that differ only in their seed, as one row: mean, standard deviation and number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from experiments.records.identity import differing_settings, without_seed
from experiments.tables.rows import named_identities, score_columns
from experiments.tables.rows.run import BLOCKS, QUESTIONS


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs that differ in nothing but the seed as one row each, in their order.

    A numeric column holds the mean; a score `x` has its standard deviation beside it in `x_std`
    (of a sample, n - 1 in the denominator; missing for one seed). `n` is the number of runs,
    `seeds` and `folders` list them; `seed`, `folder`, `_path` and `_identity` are the first run's,
    the last without the seed. A standard error is the mean of the runs': the same questions were
    asked of each, so further seeds don't lower it. Failed and unfinished runs stay as they are,
    n = 0. Studies are those of any of the runs.
    """
    if runs.empty:
        return runs.assign(n=0)
    keys = [_key(row) for row in runs.to_dict("records")]
    groups = runs.groupby(pd.Series(keys, index=runs.index), sort=False)
    scores = score_columns(runs)
    rows = pd.DataFrame([_row(group.sort_values("seed"), scores) for _, group in groups])
    spreads = [f"{score}_std" for score in scores]
    rows = rows[[*runs.columns, *spreads, "n", "seeds", "folders"]]
    if rows["seed"].isna().any():  # else pandas makes 1234.0 of the others
        rows["seed"] = pd.Series([seeds[0] for seeds in rows["seeds"]], rows.index, dtype=object)
    kinds = list(zip(rows["model"], rows["method"], strict=True))
    settings = differing_settings(kinds, named_identities(rows), leave_usual=True)
    return rows.assign(settings=settings)


def _key(run: dict[str, Any]) -> str:
    if run["status"] != "done":
        return f"{run['status']} {run['folder']}"
    return repr((run["model"], run["method"], without_seed(run["_identity"])))


def _row(group: pd.DataFrame, scores: list[str]) -> dict[str, Any]:
    first = group.iloc[0].to_dict()
    done = first["status"] == "done"
    means = {
        column: group[column].mean()
        for column in group
        if is_numeric_dtype(group[column]) and column != "seed"
    }
    spreads = {f"{score}_std": group[score].std(ddof=1) for score in scores}
    own = {
        "_identity": without_seed(first["_identity"]) if done else first["_identity"],
        "n": len(group) if done else 0,
        "seeds": list(group["seed"]),
        "folders": list(group["folder"]),
        "studies": sorted({study for studies in group["studies"] for study in studies}),
        BLOCKS: _means(list(group[BLOCKS])),
        QUESTIONS: _means(list(group[QUESTIONS])),
    }
    return first | means | spreads | own


def _means(runs: list[Any]) -> dict[str, np.ndarray | None]:
    """The mean over the runs of each block of a text, or each question of a task; None of what
    isn't known of all of them."""
    known = [run if isinstance(run, dict) else {} for run in runs]
    of_each = {key: [run.get(key) for run in known] for key in known[0]}
    return {key: _mean(singles) for key, singles in of_each.items()}


def _mean(runs: list[Sequence[float] | None]) -> np.ndarray | None:
    sizes = {None if singles is None else len(singles) for singles in runs}
    return None if None in sizes or len(sizes) > 1 else np.mean(runs, axis=0)
