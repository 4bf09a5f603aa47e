"""Killed before or after any durable step of any kind of method, a second run ends in the same
bytes.

Steps are os.replace, os.fsync and Path.unlink inside a run; where to kill is sampled, spread over
all of them.
"""

import os
from pathlib import Path

import pytest

import camera

SAMPLED = 5  # kill points of a method
KINDS = {
    "prune": ("camera_p", dict(sparsity=0.3)),
    "prune, ranked on the dense model": (
        "camera_p",
        dict(sparsity=0.3, rank_scope="global"),
    ),
    "gradients": ("heapr", dict(sparsity=0.3)),
    "quantise": ("camera_q", dict(bits=2.9, group_size=16)),
    "drop experts": ("reap", dict(sparsity=0.5, sparsity_of="routed")),
    "factorise": ("d2_moe", dict(sparsity=0.4)),
    "refit and trials": (
        "camera_plus",
        dict(sparsity=0.3, compensate="layer", rank_scope="measured", target="dense"),
    ),
}


class Killed(BaseException):
    """As good as kill -9: nothing of the library handles it."""


class Kill:
    """Counts the steps; at the `at`-th one the process is as if gone, and does nothing more."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = 0, after: bool = False):
        self.at, self.after, self.steps = at, after, 0
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            patch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, step):
        def watched(*args, **kwargs):
            self.steps += 1
            if self.at and self.steps >= self.at:
                if self.after and self.steps == self.at:
                    step(*args, **kwargs)
                raise Killed  # and at all that cleaning up would do
            return step(*args, **kwargs)

        return watched


def written(folder):
    """Bytes of all that a run leaves but its reports, which state times."""
    reports = ("camera.json", "README.md")
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name not in reports
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_in_the_same_bytes(kind, checkpoints, data_folder, tmp_path, monkeypatch):
    source, (method, settings) = checkpoints("qwen2_moe"), KINDS[kind]

    def compress(folder, patch, **kill):
        out = tmp_path / folder / "out"
        steps = Kill(patch, **kill)
        calibration = camera.Calibration(samples=3, length=24)
        options = dict(data=str(data_folder), device="cpu", progress=False)
        camera.compress(source, method, out, calibration=calibration, **options, **settings)
        return steps.steps

    with monkeypatch.context() as patch:
        steps = compress("whole", patch)
    whole = written(tmp_path / "whole" / "out")
    for point in range(SAMPLED):
        at, after = 1 + (steps - 1) * point // (SAMPLED - 1), point % 2 == 1
        folder = f"killed-{at}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            compress(folder, patch, at=at, after=after)
        out = tmp_path / folder / "out"
        if not out.exists():
            with monkeypatch.context() as patch:
                compress(folder, patch)
        assert written(out) == whole, f"killed at step {at} of {steps}, after it: {after}"
