"""SLURM on this machine: one job fails, one is killed for memory, one is put back by its limit."""

import pytest

from tests.cluster.slurm_node import missing, slurm_node, version
from tests.cluster.sweeping import DIES, FAILS, bear

pytestmark = pytest.mark.cluster
SLOW = "0.3"


@pytest.fixture
def node(tmp_path_factory):
    """The environment of a running cluster."""
    if lacking := missing():
        pytest.skip(f"no {', '.join(lacking)}: apt-get install slurm-wlm munge")
    with slurm_node(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def test_a_sweep_on_slurm(node, six_runs):
    pytest.importorskip("submitit", reason="pip install 'camera-moe[slurm]'")
    runs = six_runs(
        f"slurm {version()}",
        "hydra/launcher=slurm",
        "hydra.launcher.partition=tests",
        "hydra.launcher.timeout_min=2",
        "hydra.launcher.signal_delay_s=30",
        "hydra.launcher.gpus_per_node=0",
        "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.mem_gb=2",
    )
    runs.environment |= node
    first = bear(runs, {FAILS: "fail", DIES: "too much", SLOW: "too long once"})
    assert "exceeded memory limit" in first.said and first.tries[DIES] == 1
    assert first.tries[SLOW] == 2  # put back into the queue, and done then
