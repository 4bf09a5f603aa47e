"""Tasks whose answers a model writes (GSM8K, HumanEval, MBPP, IFEval), by lm-eval's definitions."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from camera.calibration.corpora import data_folder, hub_errors, read_jsonl
from camera.evaluation.passages import at_least_one
from camera.evaluation.tasks.definitions import quiet, row_file, task_manager
from camera.evaluation.tasks.evaluate import language_model, seed_everything
from camera.evaluation.tasks.names import task_name
from camera.runtime.errors import CameraError
from camera.runtime.values import seed_of

GROUP = "evaluation.generative"
KEY = f"{GROUP}.tasks"
KNOWN = ("gsm8k", "humaneval", "mbpp", "ifeval")  # lm-eval's folders of them, found in milliseconds
CONSENT = "HF_ALLOW_CODE_EVAL"


def evaluate_generative(
    model,
    tokenizer,
    tasks: Sequence[str] = ("gsm8k", "ifeval"),
    *,
    data: str | Path,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    chat_template: bool = False,
    max_new_tokens: int | None = None,
    run_code: bool = False,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Scores of a causal language model on lm-eval tasks whose answers it writes.

    A task is lm-eval's name of it, with its own prompts, examples and metrics, or the path of a
    YAML in lm-eval's form. Rows come from the hub, or from a folder `data`
    (tasks/NAME.jsonl.gz, and NAME.fewshot.jsonl.gz for the examples before a question);
    those of a YAML from where it says. `chat_template` puts prompts, examples as turns, into the
    tokenizer's template; `max_new_tokens` replaces the task's own limit. `run_code` consents to
    running, on this machine and unprotected, the code that the model writes.

    Returns by task metric (the task's first), score and stderr of it, metrics ({name: {value,
    stderr}}, NAME/FILTER where the task filters answers in several ways), n, version, seconds.
    Raises CameraError before anything is written for what `check_generative` refuses, a tokenizer
    without a template, and a context with no room for an answer.
    """
    check_generative(tasks, data=data, run_code=run_code)
    if limit is not None:
        at_least_one(f"{GROUP}.limit", limit)
    if chat_template:
        require_template(tokenizer)
    with quiet():
        lm = language_model(model, tokenizer, batch_size, None, "float32", progress)
    options = dict(limit=limit, seed=seed_of(seed), chat_template=chat_template, run_code=run_code)
    try:
        with quiet(), _code_allowed(run_code):
            built = {task_name(task): _built(task, data) for task in tasks}
            for name, task in built.items():
                _set_length(name, task, lm.max_length, max_new_tokens)
            return {name: _scored(lm, name, task, **options) for name, task in built.items()}
    finally:
        lm.restore()


def check_generative(tasks: Sequence[str], *, data: str | Path, run_code: bool) -> None:
    """Refuse unknown tasks, code without consent and data that isn't to be had, before a run."""
    if isinstance(tasks, str) or not tasks:
        raise CameraError(f"{KEY}={tasks!r}: give a list of one task or more, such as [gsm8k]")
    for task in tasks:
        config = _definition(task, resolve=False)
        if config.get("output_type") != "generate_until":
            raise CameraError(f"{KEY}: {task} has no written answers; name it in evaluation.tasks")
        if config.get("unsafe_code") and not run_code:
            raise CameraError(
                f"{KEY}: {task} runs the code that the model writes, on this machine and without "
                f"protection; consent with {GROUP}.run_code=true, or leave the task out"
            )
        with quiet(), _code_allowed(run_code):
            config = _definition(task)
            if _is_file(task):
                _built(task, data)
            elif data_folder(data) is not None:
                _local_files(task, config, data)
            else:
                _find_on_hub(config)


def require_template(tokenizer) -> None:
    """CameraError for a tokenizer that has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise CameraError(
            f"{GROUP}.chat_template=true: the model's tokenizer has no chat template; set it to "
            "false"
        )


def _definition(task: str, *, resolve: bool = True) -> dict[str, Any]:
    """lm-eval's YAML of a task; without `resolve` nothing of the code beside it is imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if _is_file(task):
        path = Path(task).expanduser()
        if not path.is_file():
            raise CameraError(f"{KEY}: there is no file {task}")
    else:
        manager = _manager() if task in KNOWN else task_manager(False)
        if task not in manager.all_subtasks:
            raise CameraError(
                f"{KEY}: {task} is no single task of lm-eval; there are {', '.join(KNOWN)}, and "
                "others by lm-eval's names or the path of a YAML"
            )
        path = manager.task_index[task].yaml_path
    try:
        return dict(load_yaml(path, resolve_func=resolve)) | {"task": task_name(task)}
    except ImportError as error:
        raise CameraError(
            f"{KEY}: {task} needs a package that isn't installed ({error}): install it, or leave "
            "the task out"
        ) from error
    except Exception as error:
        raise CameraError(f"{KEY}: {task} can't be set up: {_reason(error)}") from error


@cache
def _manager():
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / folder for folder in KNOWN]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)


def _built(task: str, data: str | Path) -> Any:
    """lm-eval's task over its rows."""
    config, name = _definition(task), task_name(task)
    if _is_file(task) or data_folder(data) is None:
        with hub_errors(config.get("dataset_path")):
            return _manager().load([config])["tasks"][name]

    import datasets

    parts = {
        split: datasets.Dataset.from_list(read_jsonl(file))
        for split, file in _local_files(task, config, data).items()
    }
    config |= dict(dataset_path=None, dataset_name=None, dataset_kwargs=None)
    config |= dict(custom_dataset=lambda **_: parts)
    for key in ("training_split", "validation_split", "test_split"):
        if config.get(key) not in parts:
            config[key] = None
    try:
        return _manager().load([config])["tasks"][name]
    except Exception as error:
        raise CameraError(
            f"data={data}: {row_file(task)} does not hold rows that lm-eval's {task} can read: "
            f"{_reason(error)}"
        ) from error


def _local_files(task: str, config: Mapping[str, Any], data: str | Path) -> dict[str, Path]:
    """The files of a task's splits in a folder; CameraError where one is missing."""
    split = config.get("test_split") or config["validation_split"]
    names = {split: row_file(task)}
    given = (config.get("fewshot_config") or {}).get("samples")
    if config.get("num_fewshot") and given is None:
        source = config.get("fewshot_split") or config.get("training_split") or split
        names.setdefault(source, f"tasks/{task}.fewshot.jsonl.gz")
    folder = data_folder(data)
    for file in names.values():
        if not (folder / file).is_file():
            raise CameraError(
                f"data={data}: {file} is missing from that folder, which {KEY} asks for; write "
                f"lm-eval's rows of {task} there, or set data=hub where there is internet"
            )
    return {part: folder / file for part, file in names.items()}


def _find_on_hub(config: Mapping[str, Any]) -> None:
    import datasets

    with hub_errors(config["dataset_path"]):
        datasets.load_dataset_builder(config["dataset_path"], config.get("dataset_name"))


def _set_length(name: str, task: Any, context: int, max_new_tokens: int | None) -> None:
    asked = task.config.generation_kwargs
    if max_new_tokens is not None:
        asked["max_gen_toks"] = max_new_tokens
    length = asked.get("max_gen_toks", 256)  # lm-eval's own
    if length >= context:
        raise CameraError(
            f"{KEY}: {name} writes answers of {length} tokens, and the model's context holds "
            f"{context}: set {GROUP}.max_new_tokens lower"
        )


def _scored(
    lm,
    name: str,
    task: Any,
    *,
    limit: int | None,
    seed: int,
    chat_template: bool,
    run_code: bool,
) -> dict[str, Any]:
    import lm_eval

    started = time.perf_counter()
    task.set_fewshot_seed(seed=seed)
    seed_everything(seed)
    outcome = lm_eval.evaluate(
        lm,
        task_dict={"tasks": {name: task}},
        limit=limit,
        log_samples=False,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
        confirm_run_unsafe_code=run_code,
    )
    metrics = dict(_metrics(outcome["results"][name]))
    first = next(iter(metrics))
    return {
        "metric": first,
        "score": metrics[first]["value"],
        "stderr": metrics[first]["stderr"],
        "metrics": metrics,
        "n": outcome["n-samples"][name]["effective"],
        "version": outcome["versions"][name],
        "seconds": time.perf_counter() - started,
    }


def _metrics(scores: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Of lm-eval's `metric,filter` and `metric_stderr,filter` each metric with its error."""
    for key, value in scores.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = scores.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric}/{kind}"
        yield (
            name,
            {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
            },
        )


@contextmanager
def _code_allowed(run_code: bool) -> Iterator[None]:
    """The consent that `code_eval` reads from the environment, for the length of a block."""
    before = os.environ.get(CONSENT)
    if run_code:
        os.environ[CONSENT] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(CONSENT, None)
        else:
            os.environ[CONSENT] = before


def _is_file(task: str) -> bool:
    return str(task).endswith((".yaml", ".yml"))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0][:200]}"
