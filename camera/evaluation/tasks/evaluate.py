"""Zero-shot tasks by lm-eval's own definitions, from the hub or from an offline folder."""

import copy
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camera.calibration.corpora import data_folder, layout_file
from camera.evaluation.tasks.definitions import build_task, quiet, row_file, task_config
from camera.evaluation.tasks.names import KEY, NINE_TASKS, headline_metric
from camera.runtime.errors import CameraError
from camera.runtime.values import seed_of


def evaluate_tasks(
    model,
    tokenizer,
    tasks: Sequence[str] = NINE_TASKS,
    *,
    data: str | Path,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    max_length: int | None = None,
    softmax_dtype: str | None = "float32",
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Zero-shot accuracy of a causal language model on lm-eval tasks.

    Every task is lm-eval's own: prompts, splits and metrics; only where its rows come from changes
    with `data`. `limit` takes the first rows of each task, as lm-eval does. `max_length` caps the
    context below the model's own; what is longer loses its left end. `softmax_dtype=None` is
    lm-eval's default, log-probabilities in the model's own dtype, in which bf16 ties answers;
    float32 is finer. The global random generators are seeded with `seed`, as lm-eval seeds them.

    Returns by task acc, acc_stderr, acc_norm, acc_norm_stderr (None where the task has no acc_norm,
    an error also for a single row), right (a character for each question in its order: 1 where the
    headline metric is 1, 0 where it is 0; None where it has other values), n, version, data_hash
    (sha256 of all rows of the split), provenance, seconds.
    Raises CameraError for an unknown task, one without accuracy and a missing file before the first
    is run; for rows that don't fit a task and for NaN when they are met.
    """
    with quiet():
        asked = read_tasks(tasks, data=data, limit=limit, seed=seed)
        lm = language_model(model, tokenizer, batch_size, max_length, softmax_dtype, progress)
        try:
            return {task.name: task.score(lm) for task in asked}
        finally:
            lm.restore()


def read_tasks(
    tasks: Sequence[str], *, data: str | Path, limit: int | None = None, seed: int = 0
) -> "Iterator[Task]":
    """The tasks over their rows, each built when it is its turn.

    Raises CameraError at once for what `check_tasks` refuses and an impossible limit.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise CameraError(
            f"evaluation.limit={limit}: give a whole number of rows, at least 1, or null for all"
        )
    seed = seed_of(seed)
    check_tasks(tasks, data=data)
    return (Task.over(task, data, limit, seed) for task in tasks)


def check_tasks(tasks: Sequence[str], *, data: str | Path) -> None:
    """Refuse unknown or unsuitable tasks and missing files before any weight is read."""
    if isinstance(tasks, str) or not tasks:
        raise CameraError(
            f"{KEY}={tasks!r}: give a list of one task or more, such as [boolq, piqa]"
        )
    data_folder(data)
    for task in tasks:
        config = task_config(task)
        if "acc" not in [metric["metric"] for metric in config.get("metric_list") or []]:
            raise CameraError(
                f"{KEY}: {task} does not measure accuracy (acc), which the tables are made of; "
                "leave it out"
            )
        layout_file(data, row_file(task))


@dataclass(frozen=True)
class Task:
    """One of lm-eval's tasks over its rows."""

    name: str
    built: Any  # lm_eval.api.task.ConfigurableTask
    rows_sha256: str
    provenance: str
    limit: int | None
    seed: int
    seconds: float  # to build it

    @classmethod
    def over(cls, name: str, data: str | Path, limit: int | None, seed: int) -> "Task":
        """A task over its rows in `data`, set up as lm-eval's simple_evaluate does it."""
        started = time.perf_counter()
        built, rows_sha256, provenance = build_task(name, data, limit)
        # simple_evaluate also spends seconds per call on a report of the machine, which the run
        # records once.
        built.set_config(key="num_fewshot", value=0)
        built.set_fewshot_seed(seed=seed)
        seconds = time.perf_counter() - started
        return cls(name, built, rows_sha256, provenance, limit, seed, seconds)

    def requests(self) -> list:
        """What `score` is going to ask the language model."""
        self.built.build_all_requests(limit=self.limit, rank=0, world_size=1)
        self.built.build_all_requests = lambda **_: None  # lm-eval would do it again, in minutes
        return self.built.instances

    def score(self, lm) -> dict[str, Any]:
        """What `evaluate_tasks` returns of a task, by the answers of an lm-eval model."""
        import lm_eval

        started = time.perf_counter()
        seed_everything(self.seed)
        outcome = lm_eval.evaluate(
            lm,
            task_dict={"tasks": {self.name: self.built}},
            limit=self.limit,
            log_samples=True,
        )
        scores = outcome["results"][self.name]

        def score(name: str) -> float | None:
            value = scores.get(f"{name},none")
            return float(value) if isinstance(value, int | float) else None

        accuracies = {
            "acc": score("acc"),
            "acc_stderr": score("acc_stderr"),
            "acc_norm": score("acc_norm"),
            "acc_norm_stderr": score("acc_norm_stderr"),
        }
        return accuracies | {
            "right": right_answers(outcome["samples"][self.name], headline_metric(accuracies)),
            "n": outcome["n-samples"][self.name]["effective"],
            "version": outcome["versions"][self.name],
            "data_hash": self.rows_sha256,
            "provenance": self.provenance,
            "seconds": self.seconds + time.perf_counter() - started,
        }


def right_answers(samples: Sequence[dict[str, Any]], metric: str) -> str | None:
    """1 or 0 for each of lm-eval's samples by a metric, in the order of the questions.

    None where a question can be right in part: its score is neither.
    """
    unfiltered = [sample for sample in samples if sample["filter"] == "none"]  # as scores are
    ordered = sorted(unfiltered, key=lambda sample: sample["doc_id"])
    scores = [float(sample[metric]) for sample in ordered]
    return "".join(f"{score:.0f}" for score in scores) if {*scores} <= {0.0, 1.0} else None


def language_model(model, tokenizer, batch_size, max_length, softmax_dtype, progress):
    """lm-eval's own wrapper of the model; `restore()` puts back the train/eval state it changes."""
    from camera.evaluation.tasks.hf_model import PackedLM

    was_training = model.training
    lm = PackedLM(
        pretrained=model,
        # A copy: lm-eval gives a tokenizer without a pad token one of its own.
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype=softmax_dtype,
    )
    lm.show_progress = progress
    ask, quiet = lm.loglikelihood, not (progress and sys.stderr.isatty())
    lm.loglikelihood = lambda requests: refuse_nan(requests, ask(requests, disable_tqdm=quiet))
    write = lm.generate_until
    lm.generate_until = lambda requests: write(requests, disable_tqdm=quiet)
    lm.restore = lambda: model.train(was_training)
    return lm


def refuse_nan(requests: Sequence, answers: list[tuple[float, bool]]) -> list[tuple[float, bool]]:
    """The answers as they are; CameraError where one is NaN.

    The argmax over NaN is an answer like any other, so a broken model would get a score.
    """
    if any(math.isnan(score) for score, _ in answers):
        raise CameraError(
            f"{KEY}: {requests[0].task_name} gives log-probabilities that are NaN; the "
            f"checkpoint is damaged or its dtype overflows, so load it in float32 or compress "
            f"it again"
        )
    return answers


def seed_everything(seed: int) -> None:
    """Seed the global random generators, as lm-eval seeds them."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
