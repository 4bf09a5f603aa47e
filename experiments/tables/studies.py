"""Which studies each run belongs to: as it was asked, else by the settings that were varied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pandas as pd
import yaml

from experiments.config.location import CONF
from experiments.records.identity import UNNAMED, flat, measurement_key, without_seed
from experiments.tables.names.studies import (
    PRUNING,
    QUANTISING,
    study_of_grid,
    study_of_settings,
    study_order,
)

Settings = dict[str, str]
# What no study varies: it follows from other settings, or changes no more than the arithmetic.
UNVARIED = ("calibration_text", "memory", "device", "trust_remote_code")


def with_studies(runs: pd.DataFrame) -> pd.DataFrame:
    """Finished rows with their studies in `studies`, a list each; that of a dense row is empty.

    A run of a preset belongs to the studies that asked for it. Of the others one with the settings
    that its method usually has here belongs to the comparison of pruning or of quantising methods,
    and one that differs from them to the study of the settings in which it does. Such a study has
    the usual runs of the same method and ratio, too, and needs no comparison of these alone.
    """
    records = runs.to_dict("records")
    varied = _varied(records)
    own = [_own(run, keys) for run, keys in zip(records, varied, strict=True)]
    by_hand: dict[str, list[str]] = {}
    for run, keys, studies in zip(records, varied, own, strict=True):
        if keys and not run["studies"]:
            by_hand.setdefault(_kind(run), []).extend(studies)
    found = [
        studies if keys or run["method"] == "dense" else studies + by_hand.get(_kind(run), [])
        for run, keys, studies in zip(records, varied, own, strict=True)
    ]
    found = _without_parts(records, [list(dict.fromkeys(studies)) for studies in found])
    ordered = [sorted(studies, key=study_order) for studies in found]
    return runs.assign(studies=pd.Series(ordered, index=runs.index, dtype=object))


def asked_here(runs: pd.DataFrame, grids: set[str]) -> pd.DataFrame:
    """The `read_runs` rows of a sweep without the studies that only other sweeps asked for.

    `grids` are the sweep's; without any its studies are those that all of its runs have.
    """
    compressed = runs.loc[runs["method"] != "dense", "studies"] if len(runs) else []
    own = grids or set.intersection(*map(set, compressed)) if len(compressed) else grids
    kept = [[study for study in studies if study in own] for studies in runs.get("studies", [])]
    return runs.assign(studies=pd.Series(kept, index=runs.index, dtype=object))


def _without_parts(records: Sequence[dict[str, Any]], found: list[list[str]]) -> list[list[str]]:
    """Without comparisons by hand of one method whose runs all stand in a study that varies it."""
    for model in {run["model"] for run in records}:
        for comparison in (PRUNING, QUANTISING):
            rows = [
                (run, studies)
                for run, studies in zip(records, found, strict=True)
                if run["model"] == model and comparison in studies
            ]
            by_hand = all(not run["studies"] and len(studies) > 1 for run, studies in rows)
            if by_hand and len({run["method"] for run, _ in rows}) == 1:
                for _, studies in rows:
                    studies.remove(comparison)
    return found


def _own(run: dict[str, Any], varied: set[str]) -> list[str]:
    if run["method"] == "dense":
        return []
    if run["studies"]:
        return [study_of_grid(grid) for grid in run["studies"]]
    if varied:
        return [study_of_settings(varied)]
    return [PRUNING if pd.isna(run["bits"]) else QUANTISING]


def _kind(run: dict[str, Any]) -> str:
    """What a run shares with the others of a study that varies a setting."""
    asked = [run[key] for key in ("model", "method", "sparsity", "sparsity_of", "bits")]
    plain = [None if pd.isna(value) else value for value in asked]
    return repr((plain, measurement_key(run["_identity"])))


def _varied(runs: Sequence[dict[str, Any]]) -> list[set[str]]:
    """For each run the settings in which it isn't as its method usually is with that model.

    Usual is what most runs have; of several values the default, else the one that other methods
    have more often, else none.
    """
    settings = [_settings(run) for run in runs]
    everywhere: dict[tuple[str, str], Counter[str]] = {}
    of_method: dict[tuple[str, str, str], Counter[str]] = {}
    for run, own in zip(runs, settings, strict=True):
        for key, value in own.items():
            everywhere.setdefault((run["model"], key), Counter())[value] += 1
            of_method.setdefault((run["model"], run["method"], key), Counter())[value] += 1

    def is_usual(run: dict[str, Any], key: str, value: str) -> bool:
        seen, default = of_method[run["model"], run["method"], key], _defaults(run["method"])
        others = everywhere[run["model"], key]

        def place(known: str) -> tuple[int, bool, int]:
            return seen[known], default.get(key) == known, others[known]

        return all(known == value or place(known) < place(value) for known in seen)

    return [
        {key for key, value in own.items() if not is_usual(run, key, value)}
        for run, own in zip(runs, settings, strict=True)
    ]


def _settings(run: dict[str, Any]) -> Settings:
    identity = without_seed(run["_identity"])
    left_out = {*measurement_key(identity), *UNVARIED}
    kept = {key: value for key, value in identity.items() if key not in left_out}
    return {key: repr(value) for key, value in flat(kept).items() if key not in UNNAMED}


@cache
def _defaults(method: str) -> Settings:
    """What the configuration of a method that it knows sets, where no other key decides it."""
    scalars = _yaml("config.yaml")
    calibration = _yaml("hydra/shared/calibration.yaml") | _yaml("calibration/wikitext2.yaml")
    named = {f"method.{key}": value for key, value in _yaml(f"method/{method}.yaml").items()}
    named |= {f"calibration.{key}": value for key, value in calibration.items()}
    named["propagate"] = scalars["propagate"]
    found = {
        key: scalars.get(value[2:-1]) if str(value).startswith("${") else value
        for key, value in named.items()
    }
    return {key: repr(value) for key, value in found.items()}


def _yaml(name: str) -> dict[str, Any]:
    file = CONF / name
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
