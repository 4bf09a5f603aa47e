"""The table of runs, made from their folders: `python -m experiments.tables DIR` at any time.

One row per run, as numbers in table.csv, as a page in table.md and table.tex. DIR is an output
folder, or any folder that has run folders below it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from camera.errors import CameraError
from camera.evaluation.definitions import NINE_TASKS
from camera.evaluation.tasks import headline
from experiments.folders import read_json
from experiments.layouts import paper_layout, print_table, to_latex, to_markdown

KEYS = ["model", "method", "settings", "sparsity", "sparsity_of"]
REALISED = ["moe", "model", "routed"]
BITS = ["bits", "bits_raw", "bits_stored", "bits_model"]
CORPORA = ["wikitext2", "c4"]
COSTS = ["size_mb", "minutes", "peak_gb"]
# What every run has of its own, or what the table shows in columns of their own.
UNNAMED = ("model", "method._target_", "method.sparsity", "method.sparsity_of", "method.bits")


def read_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """One row per run folder, finished or not, in the order of the paper's table.

    Scores and sparsities are in percent, a failed run has its reason in `status`; the columns
    `folder` and `_identity` say where a row comes from and what its result depends on.
    """
    rows = [_row(folder) for folder in folders if (folder / "settings.json").exists()]
    frame = pd.DataFrame(rows).reindex(columns=_columns(rows))
    if frame.empty:
        return frame
    frame["settings"] = _telling_settings(rows)
    order = frame.assign(_compressed=frame["method"] != "dense")
    by = ["model", "_compressed", "sparsity", "bits", "method", "settings", "folder"]
    return frame.loc[order.sort_values(by, na_position="first").index].reset_index(drop=True)


def with_dense_rows(runs: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The runs of these names, and the dense ones measured in the same way on the same model."""
    if runs.empty:
        return runs
    own = runs["folder"].isin(names)
    measured = runs["_identity"].map(_measurement)
    dense = (runs["method"] == "dense") & measured.isin(set(measured[own])) & _done(runs)
    return runs[own | dense].reset_index(drop=True)


def write(runs: pd.DataFrame, folder: Path) -> None:
    """table.csv, table.md and table.tex in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page = paper_layout(runs)
    contents = {
        "table.csv": runs.drop(columns="_identity", errors="ignore").to_csv(index=False),
        "table.md": to_markdown(page),
        "table.tex": to_latex(page),
    }
    for name, content in contents.items():
        part = folder / f".{name}"
        part.write_text(content, encoding="utf-8")
        part.replace(folder / name)


def show(runs: pd.DataFrame) -> None:
    """Print the table to the terminal."""
    print_table(paper_layout(runs))


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    found = {column for row in rows for column in row}
    tasks = [task for task in NINE_TASKS if task in found]
    realised = [f"sparsity_{of}" for of in REALISED]
    first = [*KEYS, *realised, *BITS, *CORPORA, *tasks]
    last = ["average", *COSTS, "status", "folder", "_identity"]
    return [*first, *sorted(found - {*first, *last}), *last]


def _row(folder: Path) -> dict[str, Any]:
    stored = read_json(folder / "settings.json")
    settings, identity = stored["settings"], stored["identity"]
    method = settings["method"]
    row = {
        "model": settings["model"]["name"],
        "method": stored["method"],
        "sparsity": _percent(method.get("sparsity")),
        "sparsity_of": method.get("sparsity_of"),
        "bits": method.get("bits"),
        "status": _status(folder),
        "folder": folder.name,
        "_identity": identity,
    }
    if row["status"] != "done":
        return row
    metrics = read_json(folder / "metrics.json")
    realised = {f"sparsity_{of}": _percent(metrics["sparsity"][of]) for of in REALISED}
    bits = {f"bits_{of}": value for of, value in metrics["bits"].items()} if row["bits"] else {}
    scores = {task: 100 * headline(result) for task, result in metrics["tasks"].items()}
    first = next(iter((metrics.get("speed") or {}).values()), {})  # of the smallest batch
    speed = {f"{phase}_x": part["ratio"] for phase, part in first.items()}
    seconds, peak = metrics["seconds"], metrics["peak_memory_bytes"]
    return (
        row
        | realised
        | bits
        | metrics["perplexity"]
        | scores
        | speed
        | {
            "average": metrics["average"],
            "size_mb": metrics["bytes"]["compressed"] / 1e6,
            "minutes": (seconds["calibrate"] + seconds["compress"] + seconds["evaluate"]) / 60,
            "peak_gb": peak / 1e9 if peak else None,
        }
    )


def _status(folder: Path) -> str:
    if (folder / "DONE").exists():
        return "done"
    error = folder / "error.txt"
    lines = error.read_text(encoding="utf-8").splitlines() if error.exists() else []
    return f"failed: {lines[0]}" if lines else "unfinished"


def _percent(fraction: float | None) -> float | None:
    # Without it 0.6 reads as 60.000000000000005 hundredths.
    return None if fraction is None else round(100 * fraction, 10)


def _measurement(identity: dict[str, Any]) -> str:
    keys = ("camera", "model", "dtype", "evaluation", "data", "seed")
    return repr({key: identity.get(key) for key in keys})


def _done(runs: pd.DataFrame) -> pd.Series:
    return runs["status"] == "done"


def _telling_settings(rows: list[dict[str, Any]]) -> list[str]:
    """For each row the settings in which it differs from another row of its model and method."""
    flat = [_flatten(row["_identity"]) for row in rows]
    values: dict[tuple, set[str]] = {}
    for row, settings in zip(rows, flat, strict=True):
        for key, value in settings.items():
            values.setdefault((row["model"], row["method"], key), set()).add(repr(value))
    return [
        ", ".join(
            f"{key.removeprefix('method.')}={_short(value)}"
            for key, value in settings.items()
            if key not in UNNAMED and len(values[row["model"], row["method"], key]) > 1
        )
        for row, settings in zip(rows, flat, strict=True)
    ]


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def _short(value: Any) -> str:
    return "+".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def find_runs(folder: Path) -> list[Path]:
    """The run folders of an output folder, or whatever run folders lie below it."""
    if (folder / "runs").is_dir():
        return sorted((folder / "runs").iterdir())
    return sorted(file.parent for file in folder.rglob("settings.json"))


def main(arguments: list[str]) -> int:
    """Remake and print the table of a folder."""
    folder = Path(arguments[0]) if len(arguments) == 1 else None
    try:
        if folder is None:
            raise CameraError("usage: python -m experiments.tables DIR")
        runs = read_runs(find_runs(folder))
        if runs.empty:
            raise CameraError(f"{folder} has no runs; give the folder that was `output`.")
    except CameraError as error:
        print(error, file=sys.stderr)
        return 1
    write(runs, folder)
    show(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
