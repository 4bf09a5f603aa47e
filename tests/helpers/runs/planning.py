"""Sweeps planned as main.py plans them, and not launched."""

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.config.schema import CONF
from experiments.sweeps.grids import overrides_of
from experiments.sweeps.jobs import SweepJob, planned


def asked_of(*arguments: str, params=None, grids=None) -> list[list[str]]:
    """Each job's overrides; params and grids are the command's unless given."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [overrides for _, overrides in _asked(_config(*arguments), params, grids)]


def jobs_of(*arguments: str, grids=None) -> list[SweepJob]:
    """The runs of a command, composed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = _config(*arguments)
        return planned(_asked(config, grids=grids), config, GlobalHydra.instance().config_loader())


def grids_of(preset: str) -> dict:
    """The grids of a preset, to be planned without composing it again for every job."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(_config(f"experiment={preset}").hydra.sweeper.grids)


def _config(*arguments: str) -> DictConfig:
    return GlobalHydra.instance().hydra.compose_config(
        "config", list(arguments), RunMode.MULTIRUN, with_log_configuration=False
    )


def _asked(config: DictConfig, params=None, grids=None):
    said = OmegaConf.to_container(config.hydra.sweeper)
    params = said["params"] if params is None else params
    grids = said["grids"] if grids is None else grids
    told = list(config.hydra.overrides.task)
    return overrides_of(params, grids, told, GlobalHydra.instance().config_loader())
