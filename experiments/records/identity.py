"""What a run's result depends on: what tells two runs apart, and what makes them comparable."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from camera import MATHEMATICS
from camera.calibration.corpora import CORPORA, HUB, corpus_file
from camera.calibration.settings import SELF_SAMPLED, shares_of
from camera.checkpoint.source import fingerprint, resolve_model, revision_of
from camera.evaluation.tasks.definitions import row_file
from camera.evaluation.tasks.names import task_name
from camera.runtime.errors import CameraError
from camera.runtime.files import known_digest
from experiments.config.location import EMBEDDED
from experiments.config.settings import Settings, arguments
from experiments.tiny_moe import layout

# Settings of the machine: they change no result, so a run that ran out of memory continues with a
# smaller batch.
MACHINE = ("batch_size", "perplexity_batch_size", "stream", "dequantize")
GENERATIVE_MACHINE = ("batch_size", "run_code")
ROUNDING = ("phi", "experts")  # choices of memory that sum in another order
# What every run has of its own, or what the table shows in columns of their own.
UNNAMED = ("model", "method.name", "method.sparsity", "method.sparsity_of", "method.bits")


def compression_identity(settings: Settings) -> dict[str, Any]:
    """What the compressed model depends on.

    The device is the one asked for: a sweep is planned where there may be none of those that its
    jobs compute on. What `auto` came to is added when a run starts (`experiments.runs`).
    """
    identity = {
        "mathematics": MATHEMATICS,
        "versions": _versions("torch", "transformers"),
        "model": _contents(settings.model_path),
        "method": {"name": settings.method_name, **arguments(settings.method)},
        "device": settings.device.partition(":")[0],
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code,
    }
    if settings.dtype != "auto" or settings.save_dtype != "auto":
        # also of an asked dtype: it was what the checkpoint had, before there was a save_dtype
        identity["save_dtype"] = settings.save_dtype
    if settings.store != "bfloat16":  # what there was before it could be chosen
        identity["store"] = settings.store
    if settings.calibrates:
        asked = arguments(settings.calibration)
        if asked.get("sources") is None:  # as before there were any
            asked.pop("sources", None)
        sources = shares_of(asked["source"], asked.get("sources"))
        identity["calibration"] = asked
        texts = [(s, asked["split"]) for s in sources if s != SELF_SAMPLED]
        identity["calibration_text"] = _texts(settings.data, texts)
        identity["propagate"] = settings.propagate
        identity["memory"] = {key: settings.memory[key] for key in ROUNDING}
        identity["seed"] = settings.seed
    return identity


def evaluation_identity(settings: Settings) -> dict[str, Any]:
    """What the measurements depend on besides the compressed model."""
    kept = {key: value for key, value in settings.evaluation.items() if key not in MACHINE}
    corpora, tasks, packages = list(kept["perplexity"]), kept["tasks"], ["torch", "transformers"]
    if kept.get("divergence") is None:
        kept.pop("divergence", None)  # runs of before there was one keep their names
    written = (kept.pop("generative", None) or {}).copy()
    if written.get("tasks"):
        packages.append("lm-eval")
        written["tasks"] = [_definition(task) for task in written["tasks"]]
        kept["generative"] = {k: v for k, v in written.items() if k not in GENERATIVE_MACHINE}
    if kept["speed"]["batch_sizes"]:
        corpora.append("wikitext2")  # its prompts
    else:
        del kept["speed"]
    if tasks:
        packages.append("lm-eval")
    splits = [(c, CORPORA[c].evaluated if c in CORPORA else "file") for c in corpora]
    return {
        "evaluation": kept,
        "versions": _versions(*packages),
        "data": _texts(settings.data, splits, [*tasks, *written.get("tasks", [])]),
        "seed": settings.seed,
    }


def measurement_key(identity: dict[str, Any]) -> dict[str, Any]:
    """How a run was measured and on which model: runs that agree in it can be compared.

    The seed isn't part of it: it draws what a method is calibrated on, not what is measured.
    """
    keys = ("mathematics", "versions", "model", "dtype", "computed", "evaluation", "data")
    return {key: identity.get(key) for key in keys}


def without_seed(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity that runs with different seeds share."""
    method = {key: value for key, value in identity["method"].items() if key != "seed"}
    rest = {key: value for key, value in identity.items() if key != "seed"}
    return rest | {"method": method}


def differing_settings(
    kinds: Sequence[tuple[str, ...]],
    identities: Sequence[dict[str, Any]],
    *,
    leave_usual: bool = False,
) -> list[str]:
    """For each identity the settings in which it differs from another one of its kind.

    A kind is what is known of a run anyway, such as its model and method. `leave_usual` leaves out
    the value that more identities of a kind have than any other.
    """
    named = [flat(identity) for identity in identities]
    values: dict[tuple, Counter[str]] = {}
    different = {
        (kind, repr(settings)): settings for kind, settings in zip(kinds, named, strict=True)
    }
    for (kind, _), settings in different.items():
        for key, value in settings.items():
            values.setdefault((kind, key), Counter())[repr(value)] += 1

    def told(seen: Counter[str], value: Any) -> bool:
        (most, count), *others = seen.most_common(2)
        usual = leave_usual and repr(value) == most and others and count > others[0][1]
        return len(seen) > 1 and not usual

    return [
        ", ".join(
            f"{key.removeprefix('method.')}={_short(value)}"
            for key, value in settings.items()
            if key not in UNNAMED and told(values[kind, key], value)
        )
        for kind, settings in zip(kinds, named, strict=True)
    ]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    named: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        named |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return named


def _versions(*packages: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package).partition("+")[0]  # +cpu: that is the device's matter
        except PackageNotFoundError:
            found[package] = None
    return found


def _definition(task: str) -> str:
    """A task's name; of a YAML what is in it, too."""
    if task_name(task) == task:
        return task
    file = Path(task).expanduser()
    content = known_digest(file)[:12] if file.is_file() else "absent"  # refused by the check
    return f"{task_name(task)}:{content}"


def _contents(model: str) -> str:
    # What is in a local folder rather than where it is: it may move, and may be trained again.
    folder = Path(model).expanduser()
    return fingerprint(folder) if (folder / "config.json").is_file() else _hub_contents(model)


@cache
def _hub_contents(model: str) -> str:
    """A hub id with the commit that it stands for, asked for once by a process."""
    try:
        revision = revision_of(resolve_model(model, weights=False))
    except CameraError:  # raised again, with the reason in its folder, when the run is checked
        return model
    return f"{model.partition('@')[0]}@{revision}"


def _texts(data: str, corpora: Iterable[tuple[str, str]], tasks: Iterable[str] = ()) -> str:
    """What is in the texts that are read, rather than where they are."""
    # What the generator writes rather than its name: other texts give other results.
    place = f"{EMBEDDED}-{layout.fingerprint()}" if data == EMBEDDED else data
    remote = data in (EMBEDDED, HUB)
    files = {f"{c}/{s}": corpus_file(HUB if remote else data, c, s) for c, s in corpora}
    if not remote:
        place = "folder"
        files |= {task: Path(data).expanduser() / row_file(task) for task in tasks}
    found = {name: file for name, file in sorted(files.items()) if file is not None}
    if not found:
        return place
    digest = hashlib.sha256()
    for name, file in found.items():
        content = known_digest(file) if file.is_file() else "absent"  # refused by the check
        digest.update(f"{Path(name).name}:{content}".encode())
    return f"{place}-{digest.hexdigest()[:12]}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    return "+".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
