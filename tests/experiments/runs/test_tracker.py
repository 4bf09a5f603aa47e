"""The offline W&B run is read back from its file: what it holds, and how it ended."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from camera.runtime.errors import CameraError
from experiments.config.settings import Settings
from experiments.runs import measurements
from experiments.runs.run import run
from tests.helpers.runs.composing import settings_of, tiny
from tests.helpers.runs.offline_wandb import Kept, read_back

TASKS = ("boolq", "piqa")
POOL = 8 * 24 + 40  # eight routed experts and the shared one


@pytest.fixture(scope="module")
def make(checkpoints, data_folder, tmp_path_factory):
    """make(*overrides): settings of a run that takes a second and is tracked."""

    def settings(*more: str) -> Settings:
        output = tmp_path_factory.mktemp("output")
        overrides = tiny(checkpoints("qwen2_moe"), data_folder, output)
        return settings_of(*overrides, "tracker=wandb", *more)

    return settings


@pytest.fixture(scope="module")
def good(make) -> tuple[Settings, Path, Kept]:
    """A run that succeeds: its settings, its folder, and what W&B kept of it."""
    settings = make("alpha=0.7", "tracker.tags=[study]", f"evaluation.tasks=[{','.join(TASKS)}]")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_DATA_DIR", raising=False)
        patch.setattr(measurements, "evaluate_tasks", answers)
        patch.setattr("camera.evaluation.tasks.evaluate.check_tasks", lambda *_, **__: None)
        folder = run(settings, sweep="sweep-1")
    (kept,) = read_back(folder)
    return settings, folder, kept


@pytest.fixture(scope="module")
def resumed(make) -> tuple[Path, Kept, Kept]:
    """A run that failed and then succeeded: its folder, and what W&B kept of the two."""
    settings = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "perplexity", fails_in("c4", measurements.perplexity))
        with pytest.raises(CameraError):
            run(settings)
    folder = run(settings)
    failed, finished = read_back(folder)
    return folder, failed, finished


def test_a_good_run_is_mirrored(good):
    settings, folder, kept = good
    metrics = metrics_of(folder)
    assert kept.exit == 0
    assert kept.run.run_group == "sweep-1"
    assert kept.run.job_type == "camera_p"
    assert kept.run.display_name == folder.name
    assert set(kept.run.tags) == {settings.model["name"], "camera_p", "study"}
    for key, value in settings.to_dict().items():
        assert kept.config[key] == value
    perplexity = metrics["perplexity"]["wikitext2"]
    assert kept.history["perplexity-wikitext2/perplexity"] == pytest.approx(perplexity)
    for key in ("peak_memory_bytes", "average"):
        assert kept.summary[key] == metrics[key]
    assert "compress/seconds/compress" in kept.history


def test_energies_are_histograms(good):
    *_, kept = good
    for layer in range(3):
        counts = kept.history[f"energy/layer_{layer:02d}.values"]
        assert kept.history[f"energy/layer_{layer:02d}._type"] == "histogram"
        assert len(kept.history[f"energy/layer_{layer:02d}.bins"]) == len(counts) + 1
        assert sum(counts) + kept.history[f"energy/zeros_{layer:02d}"] == POOL


def test_every_figure_of_the_folder_is_an_image(good):
    _, folder, kept = good
    figures = [file.stem for file in folder.glob("*.png")]
    assert {"energies", "widths"} <= set(figures)
    for figure in figures:
        assert kept.history[f"figures/{figure}._type"] == "image-file"
        with Image.open(kept.file(f"figures/{figure}")) as logged:
            assert logged.size == Image.open(folder / f"{figure}.png").size


def test_the_bits_of_experts_are_an_image_too(make):
    (kept,) = read_back(run(make("method=rtn", "bits=4.2", "evaluation=none")))
    assert kept.history["figures/bits._type"] == "image-file"
    assert not [key for key in kept.history if key.startswith("tables/")]  # nothing was measured


def test_scores_are_tables(good):
    _, folder, kept = good
    metrics = metrics_of(folder)
    perplexity = kept.table("tables/perplexity").set_index("text")["perplexity"]
    assert perplexity.to_dict() == pytest.approx(metrics["perplexity"])
    table = kept.table("tables/tasks").set_index("task")
    assert tuple(table.index) == TASKS
    assert table["score"].mean() == pytest.approx(metrics["average"])
    assert table["metric"].tolist() == ["acc", "acc_norm"]
    assert table["score"].tolist() == pytest.approx([40, 60])
    assert table["standard error"].tolist() == pytest.approx([1, 2])


def test_tables_are_synced_from_the_run_folder_alone(good):
    _, folder, kept = good
    staged = [file for files in kept.artifacts.values() for file in files]
    assert len(staged) == 2 and all(file.exists() for file in staged)
    assert all(file.is_relative_to(folder) for file in staged)


def test_a_failed_run_is_closed_as_failed(resumed):
    _, failed, _ = resumed
    assert failed.exit == 1
    assert failed.summary["error"] == "no text."
    assert "average" not in failed.summary
    assert "energy/layer_00.values" in failed.history  # what was done before it failed
    assert "perplexity-c4/perplexity" not in failed.history


def test_a_resumed_run_has_also_what_was_done_before_it_failed(resumed):
    folder, failed, finished = resumed
    assert finished.exit == 0
    assert finished.run.run_id != failed.run.run_id
    assert {**finished.config, "_wandb": None} == {**failed.config, "_wandb": None}
    assert set(failed.history) < set(finished.history)
    assert "error" not in finished.summary
    perplexity = finished.table("tables/perplexity").set_index("text")["perplexity"]
    assert perplexity.to_dict() == pytest.approx(metrics_of(folder)["perplexity"])


def test_wandb_is_quiet(make, capfd):
    run(make("method=dense", "evaluation.perplexity=[c4]"))
    assert "wandb" not in "".join(capfd.readouterr())


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def answers(model, tokenizer, names, **_) -> dict:
    """What lm-eval might say of the two tasks; boolq has no acc_norm."""
    (name,) = names
    scores = {"acc": 0.4, "acc_stderr": 0.01, "acc_norm": 0.6, "acc_norm_stderr": 0.02}
    if name == "boolq":
        scores |= {"acc_norm": None, "acc_norm_stderr": None}
    return {name: {**scores, "data_hash": "0", "seconds": 0.0}}


def fails_in(failing: str, measure: Callable) -> Callable:
    """`perplexity`, but for one text."""

    def perplexity(*args, corpus, **options):
        if corpus == failing:
            raise CameraError("no text.")
        return measure(*args, corpus=corpus, **options)

    return perplexity
