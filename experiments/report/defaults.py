"""In which settings a run isn't as `conf/` and the classes that it names set them."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import yaml

from camera.evaluation.tasks.names import NINE_TASKS
from experiments.config.constructor import locate
from experiments.config.location import CONF
from experiments.records.identity import flat

EVALUATION = "quick"  # the default option of conf/evaluation
NOTHING: dict[str, Any] = {
    "perplexity": [],
    "blocks": None,
    "tasks": [],
    "limit": None,
}  # what options begin with
NOTHING |= {"speed": {"batch_sizes": []}}
# What a row has in other columns, or what changes no result.
UNTOLD = ("model", "tracker", "seed", "sparsity", "sparsity_of", "bits", "data", "output", "force")
UNTOLD += ("retry", "keep_checkpoint", "method._target_", "method.sparsity", "method.bits")
UNTOLD += ("calibration._target_", "method.sparsity_of", "method.seed")


def differences(settings: dict[str, Any], method: str) -> dict[str, str]:
    """The settings of settings.json by their dotted names, those that aren't the default.

    A root key that the method has as a key of its own is told once, by the method's name of it.
    """
    chosen = _evaluation(settings.get("evaluation", {}))
    known = _defaults(method, settings["method"].get("_target_", ""), chosen)
    told = {} if chosen == EVALUATION else {"evaluation": chosen}
    for key, value in flat(settings).items():
        name = key.removeprefix("method.")
        is_untold = key in UNTOLD or key.split(".")[0] in UNTOLD
        if key in known and not is_untold and value != known[key]:
            told[name] = _readable(value)
    return told


def _evaluation(asked: dict[str, Any]) -> str:
    """The option of conf/evaluation that the least of what was asked differs from."""

    def distance(name: str) -> tuple[int, bool]:
        usual = flat(_measured(name))
        others = [key for key, value in flat(asked).items() if usual.get(key, value) != value]
        return len(others), name != EVALUATION

    return min((file.stem for file in sorted((CONF / "evaluation").glob("*.yaml"))), key=distance)


@cache
def _measured(name: str) -> dict[str, Any]:
    found = NOTHING | _yaml(f"evaluation/{name}.yaml")
    return found | {"tasks": [*NINE_TASKS]} if isinstance(found.get("tasks"), str) else found


@cache
def _defaults(method: str, target: str, evaluation: str) -> dict[str, Any]:
    scalars = _yaml("config.yaml")
    groups = {
        "method": _fields(target) | _yaml(f"method/{method}.yaml"),
        "calibration": _yaml("calibration/wikitext2.yaml"),
        "evaluation": _measured(evaluation),
        "memory": scalars["memory"],
    }
    found = {key: value for key, value in scalars.items() if not isinstance(value, dict)}
    for group, values in groups.items():
        found |= flat(values, f"{group}.")
    return {key: _resolved(value, scalars) for key, value in found.items()}


def _fields(target: str) -> dict[str, Any]:
    """The defaults of a class, of one that can't be imported none."""
    try:
        cls = locate(target)
    except ImportError:
        return {}
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def _resolved(value: Any, scalars: dict[str, Any]) -> Any:
    name = value[2:-1] if isinstance(value, str) and value.startswith("${") else None
    value = scalars.get(name, value) if name else value
    return list(value) if isinstance(value, tuple) else value


def _yaml(name: str) -> dict[str, Any]:
    """A file of conf/ on top of what it shares with others."""
    file = CONF / name
    if not file.is_file():
        return {}
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        if isinstance(entry, str) and entry.startswith("/hydra/shared/"):
            found |= _yaml(f"{entry[1:].partition('@')[0]}.yaml")
    return found | own


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    return "+".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
