"""What trackers are told of a run: its name and settings, the numbers and tables of its report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from camera.calibration.corpora import HUB
from camera.evaluation.tasks.names import headline, headline_metric, task_name
from camera.runtime.errors import CameraError
from experiments.records.files import GENERATIVE, PERPLEXITY, TASK
from experiments.tables.names.datasets import WRITTEN, data_name, dataset_label

if TYPE_CHECKING:
    import pandas as pd

    from experiments.config.settings import Settings

# How a run is carried out: nothing of it is a property of the result.
CARRIED_OUT = ("tracker", "output", "force", "retry", "keep_checkpoint", "objective", "dry_run")
COSTS = ("sparsity/moe", "sparsity/model", "size/gb", "size/share")
COSTS += ("seconds/calibrate", "seconds/compress", "seconds/evaluate", "memory/peak_gb")
MEASURES = ("kl", "agreement", "acceptance")  # of the comparison with the dense model
BITS = ("bits/stored", "bits/model")  # of methods that quantise
GB = 1e9


def start_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a tracker's `start`, from what settings.json holds."""
    settings, origin = stored["settings"], stored.get("origin") or {}
    method, preset = origin.get("method", stored["method"]), stored.get("preset")
    ratio, data = ratio_of(settings["method"] | origin), data_name(settings.get("data", HUB))
    told = [settings["model"]["name"], method, preset, *ratio, None if data == HUB else data]
    return {
        "name": "-".join([method, *(part.removesuffix("%").replace(" ", "") for part in ratio)]),
        "group": group_of(stored.get("sweep"), preset),
        "job_type": method,
        "tags": [tag for tag in told if tag],
        "config": config_of(stored),
    }


def ratio_of(method: Mapping[str, Any]) -> list[str]:
    """What a method is set to remove or to store: `40%`, `2.25 bits`, both or nothing."""
    sparsity, bits = method.get("sparsity"), method.get("bits")
    removed = [] if sparsity is None else [f"{100 * sparsity:.4g}%"]
    return removed + ([] if bits is None else [f"{bits:.4g} bits"])


def group_of(sweep: str | None, preset: str | None) -> str | None:
    """The name of a sweep for people, from that of its folder, a time: `main-20261128-0314`."""
    if sweep is None:
        return None
    minute = re.match(r"\d{8}-\d{4}", sweep)
    return f"{preset or 'sweep'}-{minute[0] if minute else sweep}"


def config_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run; null is what its result doesn't depend on.

    It depends on what its identity names and on the method's own settings, so a dense run has
    neither `sparsity`, `bits` nor a calibration.
    """
    settings, identity = stored["settings"], stored["identity"]
    own = _without_class(settings["method"])
    shared = {key: value if key in identity else None for key, value in settings.items()}
    if shared["calibration"]:
        shared["calibration"] = _without_class(shared["calibration"])
    told = {key: own.get(key, value) for key, value in shared.items() if key not in CARRIED_OUT}
    return told | {"method": {"name": stored["method"], **own}}


def _without_class(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "_target_"}


def check_objective(settings: Settings) -> None:
    """CameraError for an objective that a run with these settings doesn't report."""
    objective, asked = settings.objective, settings.evaluation
    texts = [f"perplexity/{text}" for text in asked["perplexity"]]
    if asked.get("divergence") is not None:
        texts += [f"{name}/{text}" for name in MEASURES for text in asked["perplexity"]]
    tasks = [f"acc/{task}" for task in asked["tasks"]]
    written = (asked.get("generative") or {}).get("tasks", [])
    texts += [f"generative/{task_name(task)}" for task in written]
    known = [*texts, *tasks, *(["average"] if tasks else []), *COSTS]
    known += BITS if settings.method.get("bits") is not None else ()
    if objective is not None and objective not in known:
        raise CameraError(
            f"objective={objective} isn't measured: with these settings it is one of "
            f"{', '.join(known)}."
        )


def scores_of(name: str, part: Mapping[str, Any]) -> dict[str, float]:
    """The score of a measured part: `perplexity/TEXT`, or `acc/TASK` in percent."""
    if name.startswith(PERPLEXITY):
        text = name.removeprefix(PERPLEXITY)
        return {f"perplexity/{text}": part["perplexity"]} | _divergence(text, part)
    if name.startswith(TASK):
        return {f"acc/{name.removeprefix(TASK)}": 100 * headline(part)}
    if name.startswith(GENERATIVE):
        return {f"generative/{name.removeprefix(GENERATIVE)}": 100 * part["score"]}
    return {}


def _divergence(text: str, part: Mapping[str, Any]) -> dict[str, float]:
    """`kl/TEXT` in nats per token, `agreement/TEXT` and `acceptance/TEXT` in percent."""
    found = part.get("divergence")
    if not found:
        return {}
    shares = {f"{name}/{text}": 100 * found[name] for name in ("agreement", "acceptance")}
    return {f"kl/{text}": found["kl"]} | shares


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The results of a finished run, about twenty numbers by slash-separated names."""
    found: dict[str, float] = {}
    divergence = metrics.get("divergence") or {}
    for corpus, perplexity in metrics["perplexity"].items():
        part = {"perplexity": perplexity, "divergence": divergence.get(corpus)}
        found |= scores_of(f"{PERPLEXITY}{corpus}", part)
    for task, scores in metrics["tasks"].items():
        found |= scores_of(f"{TASK}{task}", scores)
    for task, part in (metrics.get("generative") or {}).items():
        found |= scores_of(f"{GENERATIVE}{task}", part)
    size, seconds = metrics["bytes"], metrics["seconds"]
    found |= {f"sparsity/{of}": metrics["sparsity"][of] for of in ("moe", "model")}
    if metrics["settings"]["method"].get("bits") is not None:
        found |= {f"bits/{of}": metrics["bits"][of] for of in ("stored", "model")}
    found |= {"size/gb": size["compressed"] / GB, "size/share": size["compressed"] / size["dense"]}
    found |= {f"seconds/{part}": seconds[part] for part in ("calibrate", "compress", "evaluate")}
    if peak := metrics["peak_memory_bytes"]:  # none where nothing was compressed
        found["memory/peak_gb"] = peak / GB
    for batch, phases in (metrics.get("speed") or {}).items():
        found |= {f"speed/{phase}_{batch}": part["ratio"] for phase, part in phases.items()}
    return found if metrics["average"] is None else found | {"average": metrics["average"]}


def layer_numbers(measured: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a layer as they are shown: memory in GB."""
    found = dict(measured)
    if "memory_bytes" in found:
        found["memory_gb"] = found.pop("memory_bytes") / GB
    return found


def score_tables(metrics: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """What a run's report says of its texts (`perplexity`) and of its tasks (`tasks`), a row each,
    by the names that they have in tables.

    A task's `score` is its acc_norm where it has one, else its acc, with the standard error of
    that one; all in percent. Nothing was measured: no table.
    """
    import pandas as pd

    named = partial(dataset_label, data=metrics.get("data", HUB))
    perplexity = pd.DataFrame(
        [
            {"text": named(text), "perplexity": value} | _divergence_row(metrics, text)
            for text, value in metrics["perplexity"].items()
        ]
    )
    tasks = pd.DataFrame(_task_row(named(task), found) for task, found in metrics["tasks"].items())
    written = pd.DataFrame(
        {
            "task": named(f"{WRITTEN}{task}"),
            "metric": name,
            "score": 100 * found["value"],
            "standard error": error,
        }
        for task, part in (metrics.get("generative") or {}).items()
        for name, found in part["metrics"].items()
        for error in [None if found["stderr"] is None else 100 * found["stderr"]]
    )
    tables = {"perplexity": perplexity, "tasks": tasks, "generative": written}
    return {name: table for name, table in tables.items() if len(table)}


def _divergence_row(metrics: Mapping[str, Any], text: str) -> dict[str, float]:
    numbers = _divergence(text, {"divergence": (metrics.get("divergence") or {}).get(text)})
    return {name.partition("/")[0]: value for name, value in numbers.items()}


def _task_row(task: str, found: dict[str, float | None]) -> dict[str, Any]:
    metric = headline_metric(found)
    shares = {"score": headline(found), "standard error": found[f"{metric}_stderr"]} | found
    percent = {key: None if share is None else 100 * share for key, share in shares.items()}
    return {"task": task, "metric": metric} | percent
