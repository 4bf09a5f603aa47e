"""The report's first lines: when, by which commands, of which code, on which data and machine."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from camera.calibration.settings import source_name
from camera.evaluation.tasks.names import PAPER_TASKS
from experiments.records.files import OutputFolder, is_json, read_json
from experiments.report.runs import Run
from experiments.tables.names.datasets import dataset_label

COMMAND = "python main.py"
TASKS = {task.name for task in PAPER_TASKS}


def facts(runs: Sequence[Run], folder: Path) -> dict[str, list[str]]:
    """What is to be said above all, by its name; nothing of what no run tells."""
    done = [run for run in runs if run.state == "done"]
    told = {
        "Made": [time.strftime("%Y-%m-%d %H:%M")],
        "Runs finished": _span([run.finished for run in done]),
        "Command": commands(runs, folder),
        "Code": _different(_code(run) for run in done),
        "Model": _different(_model(run) for run in runs),
        "Data": _different(text for run in done for text in _data(run)),
        "Hardware": _different(_hardware(run.environment) for run in done),
        "In all runs": _different([shared_differences(runs)]),
        "Seeds": [", ".join(_different(str(run.row["seed"]) for run in runs))],
    }
    return {name: lines for name, lines in told.items() if lines}


def shared_differences(runs: Iterable[Run]) -> str:
    """What no run has as by default and all have alike; in none where there are no runs."""
    every = [run.differs for run in runs if run.differs]
    if not every:
        return ""
    shared = {k: v for k, v in every[0].items() if all(own.get(k) == v for own in every)}
    return ", ".join(f"{key}={value}" for key, value in shared.items())


def own_differences(run: Run, shared: str) -> str:
    """What a run has neither as by default nor like all others."""
    told = [f"{key}={value}" for key, value in run.differs.items()]
    return ", ".join(one for one in told if one not in shared.split(", "))


def commands(runs: Iterable[Run], folder: Path) -> list[str]:
    """The command lines of the sweeps, and of the runs that no sweep made."""
    found, made = [], set()
    for sweep in OutputFolder(folder).sweeps():
        planned = read_json(sweep.plan)["jobs"] if is_json(sweep.plan) else []
        made |= {Path(job["run"]).name for job in planned if job.get("run")}
        if sweep.config.is_file():
            overrides = yaml.safe_load(sweep.config.read_text(encoding="utf-8"))
            overrides = overrides["hydra"]["overrides"]
            multirun = " -m" if "hydra.mode=MULTIRUN" in overrides["hydra"] else ""
            found.append(" ".join([f"{COMMAND}{multirun}", _typed(overrides["task"])]))
    alone = (run for run in runs if run.name not in made and run.environment.get("overrides"))
    found += [f"{COMMAND} {_typed(run.environment['overrides'])}" for run in alone]
    return _different(found)


def _typed(overrides: Iterable[str]) -> str:
    kept = (one for one in overrides if not one.startswith("output="))
    return shlex.join(kept)


def _code(run: Run) -> str:
    version, commit = run.versions.get("camera-moe"), run.environment.get("commit")
    parts = (version and f"camera-moe {version}", commit and f"commit {commit}")
    return ", ".join(filter(None, parts))


def _model(run: Run) -> str:
    size = run.metrics.get("bytes", {}).get("dense")
    return f"{run.row['model']}, {size / 1e6:,.1f} MB" if size else ""


def _data(run: Run) -> list[str]:
    data = run.row.get("data") or ""
    hashes = run.metrics.get("data_hash", {})
    texts = [name for name, value in hashes.items() if value and name != "calibration"]
    named = [dataset_label(name, data) for name in texts if name not in TASKS]
    tasks = len(texts) - len(named)
    found = [f"measured on {', '.join(named)}" if named else ""]
    if tasks:
        found[0] = " and ".join(filter(None, (found[0], f"{tasks} tasks")))
    calibration = run.row["_identity"].get("calibration")
    if calibration:
        sizes = f"{calibration['samples']} samples"
        found.append(f"calibrated on {sizes} of {dataset_label(source_name(calibration), data)}")
    return found


def _hardware(environment: dict[str, Any]) -> str:
    if not environment:
        return ""
    device = environment.get("accelerator") or "no accelerator"
    parts = [device, f"{environment.get('cpus')} CPUs", str(environment.get("platform", ""))]
    return ", ".join(filter(None, parts))


def _span(times: Iterable[str]) -> list[str]:
    known = sorted(filter(None, times))
    if not known:
        return []
    return [known[0] if known[0] == known[-1] else f"{known[0]} to {known[-1]}"]


def _different(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]
