"""Texts and tasks as they are named to readers: never another's name for one's own data.

`data` is where they come from: "hub", "embedded" (the invented world of the embedded model) or a
folder, by its path or its name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from camera.calibration.corpora import HUB
from camera.calibration.settings import MIXTURES, SELF_SAMPLED, source_name
from camera.evaluation.tasks.names import PAPER_TASKS
from experiments.config.location import EMBEDDED
from experiments.records.mirrored import is_mirror
from experiments.tables.names.divergence import (
    NAMES,
    SHORT_NAMES,
    divergence_column,
    measure_and_text,
)

SHARES = re.compile(r"(?:^| \+ )(.+?) ([\d.e-]+%)(?=$| \+ )")  # camera's `source_name`
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4"}
SHORT_TEXTS = {"wikitext2": "Wiki2", "c4": "C4"}
TASKS = {task.name: task.short_name for task in PAPER_TASKS}
WRITTEN = "generative_"  # before the name of a task whose answers the model writes
WRITTEN_TASKS = {"gsm8k": "GSM8K", "humaneval": "HumanEval", "mbpp": "MBPP", "ifeval": "IFEval"}
EMBEDDED_TEXTS = {"wikitext2": "tiny encyclopaedia", "c4": "tiny web"}
SHORT_EMBEDDED_TEXTS = {"wikitext2": "tiny-encycl.", "c4": "tiny-web"}


def data_name(data: str) -> str:
    """What a run notes of the `data` that it asked for: "hub" for a mirror of it, too."""
    if data in (HUB, EMBEDDED):
        return data
    folder = Path(data).expanduser()
    return HUB if is_mirror(folder) else folder.absolute().name


def dataset_label(name: str, data: str, *, short: bool = False) -> str:
    """The name of a text or a task of that data in sentences, or `short` above a column.

    What is embedded begins with "tiny", what lies in a folder with that folder's name; a file's
    name is its own.
    """
    if parts := SHARES.findall(name):
        named = ((dataset_label(part, data, short=short), share) for part, share in parts)
        return " + ".join(f"{label} {share}" for label, share in named)
    if name == SELF_SAMPLED:
        return "EBSS"
    if compared := measure_and_text(name):
        measure = (SHORT_NAMES if short else NAMES)[compared[0]]
        return f"{measure} {dataset_label(compared[1], data, short=short)}"
    if name.startswith(WRITTEN):
        task = name.removeprefix(WRITTEN)
        return WRITTEN_TASKS.get(task, task) if data == HUB else f"{Path(data).name}/{task}"
    if parts := MIXTURES.get(name):
        return " + ".join(dataset_label(part, data, short=short) for part in parts)
    if "/" in name or "\\" in name or "." in name:
        return Path(name).name
    hub = ({**SHORT_TEXTS, **TASKS} if short else {**TEXTS, **TASKS}).get(name, name)
    if data == HUB:
        return hub
    if data == EMBEDDED:
        texts = SHORT_EMBEDDED_TEXTS if short else EMBEDDED_TEXTS
        return texts.get(name, f"tiny-{hub}")
    return f"{Path(data).name}/{name}"


def dataset_key(name: str, data: str) -> str:
    """The same as the name of a column in CSV files and of a key in trackers: no spaces."""
    if parts := SHARES.findall(name):
        return "+".join(f"{dataset_key(part, data)}_{share}" for part, share in parts)
    if compared := measure_and_text(name):
        return divergence_column(compared[0], dataset_key(compared[1], data))
    if data == HUB or name == SELF_SAMPLED or "/" in name or "." in name:
        return name
    if data == EMBEDDED:
        return EMBEDDED_TEXTS.get(name, f"tiny {name}").replace(" ", "_")
    return f"{Path(data).name}/{name}"


def with_text_named(identity: dict[str, Any], data: str) -> dict[str, Any]:
    """What a result depends on, the calibration text by the name that it may have."""
    calibration = identity.get("calibration")
    if not calibration:
        return identity
    named = calibration | {"source": dataset_label(source_name(calibration), data)}
    return identity | {"calibration": named}


def data_note(data: str) -> str | None:
    """What has to be said below numbers that aren't of the public data sets; None for those."""
    if data == HUB:
        return None
    if data == EMBEDDED:
        return (
            "tiny-…: the invented texts and tasks of the embedded model; they say nothing of the "
            "public data sets in whose form they are written."
        )
    folder = Path(data).name
    return f"{folder}/…: files of the data folder {folder}, whose content is its owner's."
