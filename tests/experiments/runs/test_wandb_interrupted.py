"""W&B of a run that is interrupted, refused or untroubled: no twin, no empty run, no word."""

from collections.abc import Callable
from pathlib import Path

import pytest

from camera.runtime.errors import CameraError
from experiments.runs import measurements
from experiments.runs.run import run
from tests.helpers.runs.composing import settings_of, tiny
from tests.helpers.runs.offline_wandb import Kept, read_back, superseded


@pytest.fixture(scope="module")
def resumed(checkpoints, data_folder, tmp_path_factory) -> tuple[Path, Kept, Kept]:
    """A run that failed and then succeeded: its folder, and what W&B kept of the two."""
    tracked = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path_factory.mktemp("output"))
    settings = settings_of(*tracked, "tracker=wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "perplexity", fails_in("c4", measurements.perplexity))
        with pytest.raises(CameraError):
            run(settings)
    folder = run(settings)
    (failed,), (finished,) = superseded(folder), read_back(folder)
    return folder, failed, finished


def test_a_failed_run_is_closed_as_failed(resumed):
    _, failed, _ = resumed
    assert failed.exit == 1
    assert failed.summary["error"] == "no text."
    assert "seconds/evaluate" not in failed.summary
    assert "layer/kept_share" in failed.history  # what was done before it failed
    assert "perplexity/c4" not in failed.summary
    assert "log.txt" in failed.files


def test_a_resumed_run_leaves_no_twin(resumed):
    folder, failed, finished = resumed
    assert finished.exit == 0 and "error" not in finished.summary
    assert finished.run.run_id != failed.run.run_id
    assert {**finished.config, "_wandb": None} == {**failed.config, "_wandb": None}
    assert curves(failed) == curves(finished)
    for key in curves(finished):  # the layers of the first attempt
        assert failed.curve(key) == finished.curve(key)
    assert set(failed.history) < set(finished.history)
    assert [path.name for path in folder.glob("wandb/offline-run-*")] == [finished.folder.name]


def test_a_refusal_opens_no_run(checkpoints, data_folder, tmp_path):
    tracked = (*tiny(checkpoints("qwen2_moe"), data_folder, tmp_path), "tracker=wandb")
    settings = settings_of(*tracked, "method=rtn", "bits=400")
    with pytest.raises(CameraError, match="bits=400"):
        run(settings)
    assert not list(tmp_path.rglob("wandb"))


def test_wandb_is_quiet(checkpoints, data_folder, tmp_path, capfd):
    tracked = (*tiny(checkpoints("qwen2_moe"), data_folder, tmp_path), "tracker=wandb")
    run(settings_of(*tracked, "method=dense", "evaluation.perplexity=[c4]"))
    assert "wandb" not in "".join(capfd.readouterr())


def curves(kept: Kept) -> set[str]:
    return {key for key in kept.history if key.startswith("layer/")}


def fails_in(failing: str, measure: Callable) -> Callable:
    """`perplexity`, but for one text."""

    def perplexity(*args, corpus, **options):
        if corpus == failing:
            raise CameraError("no text.")
        return measure(*args, corpus=corpus, **options)

    return perplexity
