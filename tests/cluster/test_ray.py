"""The launcher on Ray's own API: a cluster of this machine alone."""

from importlib.metadata import version

import pytest

from tests.cluster.sweeping import DIES, FAILS, bear

pytestmark = pytest.mark.cluster


def test_a_sweep_on_ray(six_runs):
    pytest.importorskip("ray", reason="pip install 'camera-moe[ray]'")
    runs = six_runs(
        f"ray {version('ray')}",
        "hydra/launcher=ray",
        "hydra.launcher.ray.remote.num_cpus=1",
        "hydra.launcher.ray.remote.num_gpus=0",
        "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false",
    )
    first = bear(runs, {FAILS: "fail", DIES: "kill"})
    assert first.tries[DIES] == 2  # Ray itself starts it once more
