"""Settings composed as main.py composes them, and main.py itself, without a subprocess each."""

import logging
import runpy
import sys
from pathlib import Path
from unittest import mock

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.config.schema import CONF
from experiments.config.settings import Settings


def config_of(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def settings_of(*overrides: str) -> Settings:
    return Settings.of(config_of(*overrides))


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def tiny(model: Path, data: Path, output: Path) -> list[str]:
    """Overrides for a run that takes a second."""
    return [
        f"model.path={model}",
        f"data={data}",
        f"output={output}",
        "tracker=none",
        "evaluation=perplexity",
        "evaluation.blocks=2",
        "evaluation.divergence=null",
        "calibration.samples=4",
        "calibration.length=48",
    ]


def command(*arguments: str) -> int:
    """The exit code of `python main.py ARGUMENTS`, in this process: imports take long."""
    handlers = list(logging.getLogger().handlers)
    script = str(CONF.parent / "main.py")
    try:
        with mock.patch.object(sys, "argv", [script, *arguments]):
            runpy.run_path(script, run_name="__main__")
        return 0
    except SystemExit as exit_:
        return exit_.code
    finally:
        logging.getLogger().handlers = handlers
