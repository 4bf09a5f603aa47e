"""Presets: each says what it shows, adds up with the others, and its jobs could start."""

from contextlib import contextmanager
from unittest import mock

import pytest
from omegaconf import OmegaConf

from experiments.config.location import CONF
from experiments.config.settings import Settings, check
from experiments.records.folders import Folders
from experiments.tables.rows import read_runs
from tests.helpers.runs.composing import choices, command, tiny
from tests.helpers.runs.planning import asked_of, grids_of, jobs_of

FOLDER = CONF / "experiment"
PRESETS = [name for name in choices("experiment") if name not in ("all", "paper")]
PAPERS_MODELS = {
    "deepseek_moe_16b",
    "qwen2_57b_a14b",
    "qwen3_30b_a3b",
    "mixtral_8x7b",
    "phi35_moe",
}


def jobs(*arguments):
    """What each job of a command is asked for, by key."""
    return [dict(text.split("=", 1) for text in job) for job in asked_of(*arguments)]


@pytest.mark.parametrize("name", choices("experiment"))
def test_a_preset_starts_with_what_it_shows(name):
    package, shows, *_ = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert package == "# @package _global_"
    assert shows.startswith("# ") and len(shows) > 40


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_grids_under_its_own_name_so_that_presets_add_up(name):
    said = OmegaConf.load(FOLDER / f"{name}.yaml")
    assert set(said) == {"hydra"} and said.hydra.mode == "MULTIRUN"
    assert set(said.hydra.sweeper) == {"grids"} and set(said.hydra.sweeper.grids) == {name}


def test_all_is_every_preset_for_any_model():
    together = {tuple(job[:-1]) for job in asked_of("experiment=all")}
    for name in set(PRESETS) - {"plus", "serving"}:
        own = {tuple(job[:-1]) for job in asked_of(f"experiment={name}")}
        assert own and own <= together, name


def test_presets_are_added_on_the_command_line():
    both = len(jobs("experiment=alpha")) + len(jobs("experiment=scope"))
    assert len(jobs("experiment=[alpha,scope]")) == both


@contextmanager
def composed():
    """The settings of whatever is planned inside."""
    found, of = [], Settings.of

    def recorded(config):
        found.append(of(config))
        return found[-1]

    with mock.patch.object(Settings, "of", recorded):
        yield found


@pytest.fixture(scope="module")
def everything(checkpoints, data_folder, tmp_path_factory):
    """The runs of experiment=all on a tiny random model, and their settings."""
    overrides = [
        f"model.path={checkpoints('qwen2_moe')}",
        f"data={data_folder}",
        f"output={tmp_path_factory.mktemp('outputs')}",
        "evaluation.tasks=[]",  # the tiny world has none
    ]
    with composed() as settings:
        jobs = jobs_of(*overrides, grids=grids_of("all"))
    settings = {Folders.of(each).run: each for each in settings}
    return [(job, settings[job.run]) for job in jobs]


def test_every_job_could_start(everything):
    for job, settings in everything:
        assert job.run is not None, job.refused
        check(settings)


def test_every_method_is_compared(everything):
    assert {settings.method_name for _, settings in everything} >= set(choices("method")) - {
        "camera_plus",
        "layerwise_bits",
    }


def test_shared_runs_are_done_once(everything):
    runs = [job.run for job, _ in everything]
    assert len(set(runs)) == len(runs)
    (dense,) = (job for job, settings in everything if settings.method_name == "dense")
    assert len(dense.grids) >= 5
    shared = {grid for job, _ in everything if len(job.grids) > 1 for grid in job.grids}
    assert shared >= {"pruning", "alpha", "scope", "calibration_size", "calibration_source"}


def test_all_takes_less_than_two_hours_on_the_embedded_model(everything):
    # at 45 seconds a run, as measured on one core
    assert len(everything) * 45 < 2 * 3600


def test_the_paper_is_everything_with_its_settings_on_its_models():
    paper, everything = jobs("experiment=paper"), jobs("experiment=all")
    assert {job["model"] for job in paper} == PAPERS_MODELS
    assert {job["sparsity_of"] for job in paper} == {"model"}
    assert {job["calibration.length"] for job in paper} == {"2048"}
    assert {job["bits"] for job in paper if "bits" in job} == {"2.25"}
    own = {job["evaluation"] for job in everything if "evaluation" in job}
    assert {job["evaluation"] for job in paper} == {"paper"} | own
    sizes = {job["calibration.samples"] for job in paper}
    assert sizes == {"128"} | {
        job["calibration.samples"] for job in everything if "calibration.samples" in job
    }
    (gptq,) = (
        job for job in jobs("experiment=paper", "model=olmoe_1b_7b") if job["method"] == "gptq"
    )
    assert (gptq["model"], gptq["bits"]) == ("olmoe_1b_7b", "2.25")


def test_one_of_the_papers_models_could_start(checkpoints, data_folder):
    others = set(grids_of("paper")) - {"quantization"}
    overrides = [
        "experiment=paper",
        "model=mixtral_8x7b",
        f"model.path={checkpoints('mixtral')}",
        f"data={data_folder}",
        "evaluation.tasks=[]",
        *(f"hydra.sweeper.grids.{name}=null" for name in others),
    ]
    with composed() as settings:
        jobs = jobs_of(*overrides)
    assert len(jobs) == 6
    for each in settings:
        check(each)
        assert each.sparsity_of == "model" and each.model["name"] == "mixtral_8x7b"


def test_the_command_line_wins(tmp_path):
    (job,) = jobs_of("experiment=pruning", "sparsity=0.5", "method=camera_p", f"output={tmp_path}")
    assert {"method=camera_p", "sparsity=0.5"} <= set(job.overrides)
    assert len(jobs_of("experiment=matching", "method=random", f"output={tmp_path}")) == 1


def small(checkpoints, data_folder, output):
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, output)
    return [text for text in overrides if text != "evaluation=perplexity"]


def test_energies_are_measured_once_for_all_presets(checkpoints, data_folder, tmp_path):
    overrides = [*small(checkpoints, data_folder, tmp_path), "method=camera_p"]
    assert command("experiment=energy", *overrides) == 0
    assert len(list((tmp_path / "runs").glob("*/energies.png"))) == 3
    (measured,) = (tmp_path / "statistics").glob("*.safetensors")
    written = measured.stat().st_mtime_ns
    ranked = ("sparsity=0.4", "method.rank_scope=global", "evaluation=none")
    assert command("experiment=scope", *overrides, *ranked) == 0
    assert list((tmp_path / "statistics").glob("*.safetensors")) == [measured]
    assert measured.stat().st_mtime_ns == written


def test_a_preset_ends_in_the_table_of_its_runs(checkpoints, data_folder, tmp_path, capsys):
    overrides = [
        *small(checkpoints, data_folder, tmp_path),
        "evaluation=none",
        "method=camera_q",
        "bits=2.25",
    ]
    assert command("experiment=matching", *overrides) == 0
    assert "1 of 1 jobs done" in capsys.readouterr().out
    (row,) = read_runs((tmp_path / "runs").iterdir()).to_dict("records")
    assert (row["method"], row["status"], row["bits"]) == ("camera_q", "done", 2.25)
