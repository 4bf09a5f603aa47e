"""A sweep under torchrun: a run is that of one process, what all ranks refuse is recorded, a lost
one ends it in a table."""

import json
import textwrap

import pytest
import torch

from tests.helpers.checkpoints import tensors_of
from tests.helpers.machine.processes import torchrun
from tests.helpers.runs.composing import command, tiny

# main.py, of which one rank dies, or fails alone, where both compress.
FAILING = textwrap.dedent("""
    import os, sys
    from datetime import timedelta
    import camera
    from camera.runtime.distributed import rank
    from experiments.__main__ import command
    from experiments.runs import ranks

    how, compress = sys.argv.pop(1), camera.compress
    ranks.PATIENCE = timedelta(seconds=2)

    def failing(*args, **options):
        if how == "killed" and rank() == 1:
            os.kill(os.getpid(), 9)
        if how == "full" and rank() == 0:
            raise OSError(28, "No space left on device")
        return compress(*args, **options)

    camera.compress = failing
    command()
""")


@pytest.fixture
def overrides(checkpoints, data_folder, tmp_path):
    return ["-m", *tiny(checkpoints("qwen2_moe"), data_folder, tmp_path / "out"), "device=cpu"]


def table(tmp_path):
    (sweep,) = (tmp_path / "out" / "sweeps").iterdir()  # one for all ranks
    return (sweep / "table.md").read_text()


def found(output):
    """The run of Camera-P: its name, the tensors of its checkpoint, its numbers."""
    (run,), (checkpoint,) = (
        output.glob(f"{kind}/*-camera_p-*") for kind in ("runs", "checkpoints")
    )
    assert (run / "DONE").exists()
    return run.name, tensors_of(checkpoint), json.loads((run / "metrics.json").read_text())


def test_what_every_rank_refuses_does_not_end_the_sweep(overrides, tmp_path):
    done = torchrun("main.py", *overrides, "method=naee,camera_p", "sparsity=1.5,0.25")
    assert done.returncode == 1
    assert "1 of 4 jobs done" in done.stdout, done.stdout + done.stderr
    assert table(tmp_path).count("sparsity=1.5 must lie between") == 2
    assert "start it without torchrun" in table(tmp_path)

    alone = ("method=camera_p", "sparsity=0.25", f"output={tmp_path / 'alone'}")
    assert command(*overrides[1:], *alone) == 0
    (name, mine, metrics), (other, theirs, expected) = map(
        found, (tmp_path / "out", tmp_path / "alone")
    )
    assert name == other  # how many processes is no part of a run's identity
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    # summed by two processes and by one, in fp32
    assert metrics["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)


@pytest.mark.parametrize("how", ["killed", "full"])
def test_a_rank_that_is_lost_ends_the_sweep_in_its_table(how, overrides, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = torchrun(
        script, how, *overrides, "evaluation=none", "method=magnitude", "sparsity=0.2,0.3"
    )
    assert done.returncode == 1
    assert "0 of 2 jobs done" in done.stdout, done.stdout + done.stderr
    # torchrun ends the other ranks by SIGTERM, as a user would: what comes first is told
    assert "failed: " in table(tmp_path) or (how == "killed" and ": interrupted" in table(tmp_path))
    if how == "full":
        assert "free space on that disk" in table(tmp_path)
