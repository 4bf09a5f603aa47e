"""The joblib launcher: a killed worker takes the whole pool with it, and the sweep goes on."""

from importlib.metadata import version

import pytest

from tests.cluster.sweeping import DIES, FAILS, bear

pytestmark = pytest.mark.cluster


def test_a_sweep_side_by_side(six_runs):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    runs = six_runs(f"joblib {version('joblib')}", "hydra/launcher=parallel")
    first = bear(runs, {FAILS: "fail", DIES: "kill"})
    assert first.tries[DIES] == 2  # once more, by itself: its neighbour might have been to blame
