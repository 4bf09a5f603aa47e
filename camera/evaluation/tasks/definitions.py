"""lm-eval's definitions of tasks over rows from the hub or an offline folder."""

import contextlib
import difflib
import functools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from camera.calibration.corpora import HUB, hub_errors, layout_file, read_jsonl, rows_hash
from camera.evaluation.tasks.names import KEY, NINE_FOLDERS, NINE_TASKS
from camera.runtime.errors import CameraError

NOISY_LOGGERS = ("lm_eval", "datasets", "transformers.tokenization_utils_base")


def hub_address(task: str) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for the split that lm-eval evaluates."""
    config = task_config(task)
    return {
        "path": config["dataset_path"],
        "name": config.get("dataset_name"),
        "split": _split(config),
        **(config.get("dataset_kwargs") or {}),
    }


def build_task(task: str, data: str | Path, limit: int | None) -> tuple[Any, str, str]:
    """lm-eval's task over its rows, the hash of the rows, and where they came from."""
    config = dict(task_config(task))
    split = _split(config)
    path = layout_file(data, row_file(task))
    if path is None:
        with hub_errors(config["dataset_path"]):
            built = _load(task, config)
        name = "/".join(filter(None, (config["dataset_path"], config.get("dataset_name"))))
        return built, rows_hash(built.dataset[split]), f"{HUB}: {name} ({split})"

    import datasets

    rows = read_jsonl(path)
    # None of the nine drops rows as it prepares them, so what lies beyond the limit need not be
    # prepared; another task may.
    kept = rows[:limit] if task in NINE_TASKS else rows
    # Rows in memory, not the json loader: nothing is written, and no cache can serve what a file
    # held before.
    config.update(
        dataset_path=None,
        dataset_name=None,
        dataset_kwargs=None,
        custom_dataset=lambda **_: {split: datasets.Dataset.from_list(kept)},
        training_split=None,
        validation_split=None,
        test_split=None,
        fewshot_split=None,
    )
    config["test_split" if split == "test" else "validation_split"] = split
    try:
        built = _load(task, config)
    except Exception as error:
        reason = (str(error) or "no reason given").splitlines()[0][:200]
        raise CameraError(
            f"{path} does not hold rows that lm-eval's {task} can read ({type(error).__name__}: "
            f"{reason}); write it again with `camera mirror DIR`"
        ) from error
    kinds = Counter(row["provenance"] for row in rows if "provenance" in row)
    counts = "".join(f", {count} {kind}" for kind, count in sorted(kinds.items()))
    return built, rows_hash(rows), f"folder: {row_file(task)} ({split}{counts})"


def row_file(task: str) -> str:
    return f"tasks/{task}.jsonl.gz"


def _split(config: Mapping[str, Any]) -> str:
    return config.get("test_split") or config["validation_split"]


def _load(task: str, config: dict[str, Any]):
    manager = task_manager(task in NINE_TASKS)
    return manager.load([config])["tasks"][task]


@functools.cache
def task_manager(only_nine: bool):
    """lm-eval's register of tasks, without those that aren't asked for where only nine are."""
    import lm_eval.tasks

    if not only_nine:
        return lm_eval.tasks.TaskManager()
    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / folder for folder in NINE_FOLDERS]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)


def task_config(task: str) -> dict[str, Any]:
    """lm-eval's YAML of a task, functions resolved; CameraError for what is not a single task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    with quiet():
        manager = task_manager(task in NINE_TASKS)
    if task not in manager.all_subtasks:
        near = difflib.get_close_matches(str(task), manager.all_subtasks + list(NINE_TASKS), n=3)
        hint = (
            f"did you mean {', '.join(near)}" if near else f"the nine are {', '.join(NINE_TASKS)}"
        )
        what = (
            "is a group of lm-eval, not a task"
            if task in manager.all_tasks
            else "is no task of lm-eval"
        )
        raise CameraError(f"{KEY}: {task} {what}; {hint}")
    return load_yaml(manager.task_index[task].yaml_path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's and the data libraries' reports, except errors."""
    import datasets
    import lm_eval.api.task

    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    bar, bars_were_on = lm_eval.api.task.tqdm, datasets.are_progress_bars_disabled() is False
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        if bars_were_on:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
