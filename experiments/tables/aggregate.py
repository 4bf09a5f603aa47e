"""Runs that differ only in their seed, as one row: mean, standard deviation and number."""

from __future__ import annotations

from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from experiments.records.identity import differing_settings, without_seed
from experiments.tables.rows import named_identities, score_columns
from experiments.tables.rows.run import BLOCKS


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
        BLOCKS: _mean_blocks(list(group[BLOCKS])),
    }
    return first | means | spreads | own


def _mean_blocks(blocks: list[Any]) -> dict[str, list[float]]:
    """Each block's mean over the runs, of the texts whose blocks all of them have."""
    known = [run if isinstance(run, dict) else {} for run in blocks]
    shared = [text for text in known[0] if all(run.get(text) for run in known)]
    of_text = {text: [run[text] for run in known] for text in shared}
    return {
        text: [sum(values) / len(values) for values in zip(*runs, strict=True)]
        for text, runs in of_text.items()
        if len({len(run) for run in runs}) == 1
    }
