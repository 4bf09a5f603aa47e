"""Settings composed as main.py composes them, for tests that need no subprocess."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.schema import CONF
from experiments.settings import Settings


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
        "calibration.samples=4",
        "calibration.length=48",
    ]
