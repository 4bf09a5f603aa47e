"""Two ranks of torchrun do a sweep together; one of them is killed."""

import sys

import pytest
import torch

from tests.cluster.sweeping import DIES, FAILS, RATIOS

pytestmark = pytest.mark.cluster


def test_a_sweep_of_two_ranks(six_runs):
    runs = six_runs(f"torchrun of torch {torch.__version__}")
    runs.command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    runs.command += ["--nproc-per-node=2"]
    runs.spell({FAILS: "fail", DIES: "kill rank 1"})
    first = runs.run()
    assert first.code == 1, first.said
    before = RATIOS[: RATIOS.index(DIES)]
    done = {ratio for ratio, status in first.statuses.items() if status == "done"}
    assert done == {*before} - {FAILS}, first.said
    assert "its fate was to fail" in first.statuses[FAILS]
    assert first.statuses[DIES] != "done"
    assert "2 of 6 jobs done" in first.said
    runs.spell({})
    second = runs.run()
    assert second.code == 0, second.said
    assert set(second.statuses.values()) == {"done"} and len(second.statuses) == len(RATIOS)
    assert set(second.tries) == {*RATIOS} - done, second.said
