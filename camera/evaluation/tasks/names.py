"""The nine tasks of the paper, and the headline metric of a task."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camera.runtime.errors import CameraError


@dataclass(frozen=True)
class PaperTask:
    """A task of the paper: lm-eval's name and folder of it, its name in tables, its questions.

    `questions` counts the rows of the split that lm-eval evaluates. The nine folders are read in
    milliseconds, lm-eval's whole index in a quarter of a minute.
    """

    name: str
    short_name: str
    folder: str
    questions: int


PAPER_TASKS: tuple[PaperTask, ...] = (
    PaperTask("boolq", "BoolQ", "super_glue/boolq", 3270),
    PaperTask("openbookqa", "OBQA", "openbookqa", 500),
    PaperTask("rte", "RTE", "glue/rte", 277),
    PaperTask("arc_easy", "ARC-e", "arc", 2376),
    PaperTask("winogrande", "WinoG", "winogrande", 1267),
    PaperTask("hellaswag", "HellaS", "hellaswag", 10042),
    PaperTask("arc_challenge", "ARC-c", "arc", 1172),
    PaperTask("piqa", "PIQA", "piqa", 1838),
    PaperTask("mathqa", "MathQA", "mathqa", 2985),
)
NINE_TASKS: tuple[str, ...] = tuple(task.name for task in PAPER_TASKS)
NINE_FOLDERS: tuple[str, ...] = tuple(dict.fromkeys(task.folder for task in PAPER_TASKS))
KEY = "evaluation.tasks"


def task_name(task: str) -> str:
    """What a task is called in files and tables; one by the path of its YAML by the file's name."""
    return Path(task).stem if task.endswith((".yaml", ".yml")) else task


def headline_metric(task_result: Mapping[str, Any]) -> str:
    """The headline metric of a task: acc_norm if present, else acc, as in the CAMERA paper."""
    return "acc" if task_result.get("acc_norm") is None else "acc_norm"


def headline(task_result: Mapping[str, Any]) -> float:
    """The value of a task's headline metric."""
    return task_result[headline_metric(task_result)]


def average(results: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean headline of the tasks present, in percent; CameraError where there are none."""
    if not results:
        raise CameraError(f"{KEY}: there is no task result to average; run one task or more")
    return 100 * sum(headline(result) for result in results.values()) / len(results)
