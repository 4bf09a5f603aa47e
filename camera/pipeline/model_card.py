"""The model card that travels with a compressed checkpoint."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camera.compensation.settings import CompensationSettings
from camera.method import METHODS

if TYPE_CHECKING:
    from camera.pipeline.result import CompressionResult

ADDRESS = re.compile(r"https://arxiv\.org/abs/[\d.]+")
TEMPLATE = """---
base_model: {header}
library_name: transformers
tags:
- mixture-of-experts
- compressed
- {method}
---

# {name}, compressed by {method}

| | |
|---|---|
| base model | {base} |
| method | {method} |
{paper}| settings | {settings} |
| asked | {asked} |
| realised sparsity of the MoE pool | {moe} |
| realised sparsity of the whole model | {model} |
| realised sparsity of the routed experts | {routed} |
| weight files | {before:.1f} MB before, {after:.1f} MB after |
| calibration | {calibration} |
| made by | {made_by} |

{loading}
| engine | serves this checkpoint |
|---|---|
{engines}

`camera.json` holds every number of the run that made this model.
"""


NATIVE = """It is a native checkpoint of its model type:

```python
from transformers import {loader}

model = {loader}.from_pretrained("path/to/this/folder")
```
"""

OWN_FORMAT = """Its modules have formats of their own, so it needs the package `camera-moe` to load:

```python
import camera  # registers the formats
from transformers import {loader}

model = {loader}.from_pretrained("path/to/this/folder")
```

"""


def base_name(model: str | Path) -> str:
    """What a card calls the model it was made from: its hub id, or its folder's name.

    A folder of the hub's cache (models--OWNER--NAME/snapshots/COMMIT) has a hub id. A path says
    nothing on another machine.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return str(model).partition("@")[0]
    cached = folder.absolute().parts[-3:]
    if len(cached) == 3 and cached[0].startswith("models--") and cached[1] == "snapshots":
        return cached[0].removeprefix("models--").replace("--", "/")
    return folder.absolute().name


def model_card(result: CompressionResult, loader: str = "AutoModelForCausalLM") -> str:
    """README.md of a checkpoint: method, settings, realised sparsity, base model; `loader` is the
    class of transformers that loads it."""
    sparsity = result.sparsity
    calibration = "none"
    if result.calibration:
        calibration = ", ".join(
            f"{key}: {result.calibration[key]}"
            for key in ("source", "samples", "length", "seed")
            if key in result.calibration
        )
    return TEMPLATE.format(
        header=json.dumps(result.model, ensure_ascii=False),  # which is YAML, whatever the name
        base=_cell(result.model),
        name=result.model.rstrip("/").rpartition("/")[2],
        method=result.method,
        paper=_paper(result.method),
        settings=_cell(", ".join(f"{key}={value}" for key, value in _used(result.settings))),
        asked=f"{sparsity['asked']} of {sparsity['of']}",
        before=result.bytes["dense"] / 1e6,
        after=result.bytes["compressed"] / 1e6,
        calibration=_cell(calibration),
        engines="\n".join(f"| {name} | {_cell(how)} |" for name, how in result.engines.items()),
        loading=(NATIVE if result.native else OWN_FORMAT).format(loader=loader),
        made_by=", ".join(f"{name} {number}" for name, number in result.versions.items()),
        **{key: _percent(sparsity[key]) for key in ("moe", "model", "routed")},
    )


def _paper(method: str) -> str:
    """The row of the address that the method's module names, if it names one."""
    module = inspect.getmodule(METHODS[method]) if method in METHODS else None
    found = ADDRESS.search((module.__doc__ or "") if module else "")
    return f"| paper | {found[0]} |\n" if found else ""


def _used(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings without those of a refit that wasn't asked for."""
    refit = {field.name for field in fields(CompensationSettings)}
    idle = refit if settings.get("compensate") == "none" else set()
    return [(key, value) for key, value in settings.items() if key not in idle]


def _cell(text: str) -> str:
    """The text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _percent(share: float | None) -> str:
    return "none in this model" if share is None else f"{100 * share:.2f} %"
