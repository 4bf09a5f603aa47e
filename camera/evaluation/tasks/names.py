"""The nine tasks of the paper, and the headline metric of a task."""

from collections.abc import Mapping
from typing import Any

from camera.runtime.errors import CameraError

NINE_TASKS: tuple[str, ...] = (
    "boolq",
    "openbookqa",
    "rte",
    "arc_easy",
    "winogrande",
    "hellaswag",
    "arc_challenge",
    "piqa",
    "mathqa",
)
# Where lm-eval keeps the nine: reading these folders takes milliseconds, its whole index a quarter
# of a minute.
NINE_FOLDERS = (
    "super_glue/boolq",
    "openbookqa",
    "glue/rte",
    "arc",
    "winogrande",
    "hellaswag",
    "piqa",
    "mathqa",
)
KEY = "evaluation.tasks"


def headline(task_result: Mapping[str, Any]) -> float:
    """What a task is known by: acc_norm where it has one, else acc (as in the CAMERA paper)."""
    acc_norm = task_result.get("acc_norm")
    return task_result["acc"] if acc_norm is None else acc_norm


def average(results: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean headline of the tasks present, in percent; CameraError where there are none."""
    if not results:
        raise CameraError(f"{KEY}: there is no task result to average; run one task or more")
    return 100 * sum(headline(result) for result in results.values()) / len(results)
