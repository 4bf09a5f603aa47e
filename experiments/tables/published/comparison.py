"""Expected against got: the published score of a run's setting, and whether the run's agrees."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from camera.calibration.corpora import CORPORA, HUB
from camera.evaluation.tasks.names import NINE_TASKS, PAPER_TASKS
from experiments.records.files import PERPLEXITY, TASK, RunFiles

# The published models by the names they are given here, with the last part of their hub id.
MODELS = {
    "deepseek_moe_16b": "deepseek-moe-16b-base",
    "qwen2_57b_a14b": "Qwen2-57B-A14B",
    "qwen3_30b_a3b": "Qwen3-30B-A3B",
}
# Questions of the split that lm-eval evaluates: fewer of them are another measurement.
QUESTIONS = {task.name: task.questions for task in PAPER_TASKS}
LENGTH = 2048  # of a block of text, in tokens
SETTINGS = ("model", "method", "sparsity", "sparsity_of", "bits", "rank_scope", "split")
SETTINGS += ("calibration", "samples", "length")
COLUMNS = ["row", "folder", "name", "source", "score", "published", "measured", "error", "differs"]


@dataclass(frozen=True)
class Published:
    """The scores that a source gives for a setting; what that leaves open matches anything."""

    name: str
    source: str
    setting: dict[str, Any]
    scores: dict[str, float]


def published_scores() -> list[Published]:
    """All published rows of the files beside this module."""
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return [row for file in files for row in _rows(yaml.safe_load(file.read_text("utf-8")))]


def compare(means: pd.DataFrame) -> pd.DataFrame:
    """The scores of `over_seeds` rows beside what was published for the same setting.

    A row per row, source and score: `row` (its label in `means`), `folder`, `name` and `source` (of
    the publication), `score`, `published`, `measured`, `error`, `differs`. Compared is only what
    was measured in full: every question of a task, every block of 2,048 tokens of a text.

    `error` is the combined standard error √(2 se² + (1 + 1/n) s²) of a score whose standard error
    is se, with the standard deviation s over n seeds: a published score comes without an error, so
    it is taken to have the same questions' and one seed's. What isn't known counts as 0; where
    neither is, both `error` and `differs` are missing. `differs` says that published and measured
    lie further apart than that.
    """
    known = published_scores()
    done = means[means["status"] == "done"] if len(means) else means
    rows = []
    for label, row in done.iterrows():
        run = row.to_dict()
        for expected in known:
            if _matches(run, expected.setting):
                rows += [{"row": label} | found for found in _compared(run, expected)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(table: dict[str, Any]) -> list[Published]:
    found = []
    for row in table["rows"]:
        row = table["settings"] | row
        row = table["methods"].get(row["method"], {}) | row
        setting = {key: row.pop(key) for key in SETTINGS if key in row}
        found.append(Published(table["name"], table["source"], setting, row))
    return found


def _matches(run: dict[str, Any], setting: dict[str, Any]) -> bool:
    identity = run["_identity"]
    asked = identity["method"] | run | {"model": _published_name(run["model"])}
    return all(asked.get(key) == value for key, value in setting.items())


def _published_name(model: str) -> str:
    names = {_plain(hub): name for name, hub in MODELS.items()}
    return names.get(_plain(model), model)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _compared(run: dict[str, Any], expected: Published) -> list[dict[str, Any]]:
    rows = []
    for score, published in expected.scores.items():
        measured = run.get(score)
        if measured is None or math.isnan(measured) or not _in_full(run, score):
            continue
        error = _combined_error(run, score)
        differs = None if error is None else abs(measured - published) > error
        rows.append(
            {
                "folder": run["folder"],
                "name": expected.name,
                "source": expected.source,
                "score": score,
                "published": published,
                "measured": measured,
                "error": error,
                "differs": differs,
            }
        )
    return rows


def _combined_error(run: dict[str, Any], score: str) -> float | None:
    # that of a perplexity is of the choice of text, which is the published one's, too
    questions = None if score in CORPORA else run.get(f"{score}_se")
    seeds = run.get(f"{score}_std")
    parts = [
        2 * questions**2 if questions is not None and not math.isnan(questions) else None,
        (1 + 1 / run["n"]) * seeds**2 if seeds is not None and not math.isnan(seeds) else None,
    ]
    known = [part for part in parts if part is not None]
    return math.sqrt(sum(known)) if known else None


def _in_full(run: dict[str, Any], score: str) -> bool:
    """Whether a score was measured as the published ones were, and on the public data."""
    if run["data"] != HUB:
        return False
    files = RunFiles(run["_path"])
    if score == "average":
        return all(_in_full(run, task) for task in NINE_TASKS)
    if score in QUESTIONS:
        part = files.read_part(f"{TASK}{score}")
        return part is not None and part["n"] == QUESTIONS[score]
    text = files.read_part(f"{PERPLEXITY}{score}")
    if text is None or run["_identity"]["evaluation"].get("blocks") is not None:
        return False
    whole = text["length"] == text["stride"] == LENGTH and text["split"] != "train"
    return whole and "not comparable" not in text["stream"]
