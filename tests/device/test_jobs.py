"""Jobs of a sweep that run side by side on one machine with several cards."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from camera.runtime.device.accelerator import all_cards, resolve_device, share_cards
from experiments.config.schema import CONF
from experiments.records.files import SweepFiles
from experiments.sweeps.job import job


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(number, *overrides): the job does what it does in a sweep; what its run is given."""
    said = []
    monkeypatch.setattr(
        "experiments.runs.run.run",
        lambda settings, **_: said.append((resolve_device(settings.device), all_cards("auto"))),
    )
    SweepFiles(tmp_path).plan.write_text("[]")  # the project's own sweeper planned it
    before = HydraConfig.instance().cfg

    def go(number, *overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", list(overrides), return_hydra_config=True)
        with open_dict(config):
            config.hydra.mode, config.hydra.job.num = RunMode.MULTIRUN, number
            config.hydra.sweep.dir = str(tmp_path)
        HydraConfig.instance().set_config(config)
        job(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
        return said.pop()

    yield go
    share_cards(None)
    HydraConfig.instance().cfg = before


def test_jobs_side_by_side_compress_and_evaluate_on_a_card_each(start, fake, device):
    count = all_cards("auto")
    parallel = ("hydra/launcher=parallel", "hydra.launcher.n_jobs=2", "method=magnitude")
    for number in (0, 1, 2):
        assert start(number, *parallel) == (f"{fake}:{number % count}", 1)
    assert start(1, *parallel, f"device={fake}:0") == (f"{fake}:0", 1)
    assert start(1, *parallel, "device=cpu") == ("cpu", 1)


def test_a_job_alone_has_all_cards(start, fake):
    one_after_the_other = ("method=magnitude",)
    assert start(1, *one_after_the_other) == (fake, all_cards("auto"))
