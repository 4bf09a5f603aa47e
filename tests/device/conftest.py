"""A tiny model compressed on the accelerator and on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import camera
from tests.helpers.methods import method_of


@pytest.fixture(scope="session")
def device(accelerator) -> str:
    """The accelerator's last card: what forgets to say which takes the first."""
    return f"{accelerator}:{torch.accelerator.device_count() - 1}"


@pytest.fixture(scope="session")
def compressed(checkpoints, data_folder, tmp_path_factory):
    """compressed(case, where, family, settings, **options): the checkpoint, made once."""
    made: dict[tuple, Path] = {}

    def go(
        case: str, where: str, family: str = "qwen2_moe", settings: dict | None = None, **options
    ) -> Path:
        key = (case, where, family, repr(settings), repr(options))
        if key not in made:
            out = tmp_path_factory.mktemp("compressed") / "out"
            camera.compress(
                checkpoints(family, num_hidden_layers=2),
                replace(method_of(case), **(settings or {})),
                out,
                device=where,
                data=str(data_folder),
                calibration=camera.Calibration(source="wikitext2", samples=4, length=24),
                progress=False,
                **options,
            )
            made[key] = out
        return made[key]

    return go
