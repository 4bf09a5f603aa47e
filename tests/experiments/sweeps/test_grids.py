"""What a sweep asks for: products of choices added up, the command line first, each run once."""

import pytest
from hydra.errors import HydraException

from experiments.sweeps.jobs import read_plan, write_plan
from tests.helpers.runs.composing import command
from tests.helpers.runs.planning import asked_of, jobs_of


def asked(grids, *arguments, params=None):
    return asked_of(*arguments, params=params or {}, grids=grids)


def test_without_grids_the_command_line_is_a_product():
    assert asked({}, "method=dense,random", "seed=1,2") == [
        ["method=dense", "seed=1"],
        ["method=dense", "seed=2"],
        ["method=random", "seed=1"],
        ["method=random", "seed=2"],
    ]


def test_grids_add_up_and_the_command_line_reaches_all():
    pruned = {"method": "random", "sparsity": [0.2, 0.4]}
    assert asked({"a": [{"method": "dense"}], "b": [pruned], "c": None}, "seed=7") == [
        ["method=dense", "seed=7"],
        ["method=random", "sparsity=0.2", "seed=7"],
        ["method=random", "sparsity=0.4", "seed=7"],
    ]


def test_choices_are_values_lists_or_hydras_grammar():
    choices = {"a": [{"bits": "2,3", "calibration.samples": "range(1,3)", "device": None}]}
    assert asked(choices)[0] == ["bits=2", "calibration.samples=1", "device=null"]
    assert len(asked(choices)) == 4


def test_the_command_line_wins_over_a_grid_and_a_grid_over_params():
    grids, params = {"a": [{"sparsity": 0.2}]}, {"sparsity": 0.1, "seed": 3}
    assert asked(grids, params=params) == [["seed=3", "sparsity=0.2"]]
    assert asked(grids, "sparsity=0.5,0.6", params=params) == [
        ["seed=3", "sparsity=0.5"],
        ["seed=3", "sparsity=0.6"],
    ]


def test_another_method_leaves_no_setting_of_the_first_behind():
    grids = {"a": [{"method": "camera_q_dagger", "method.split": ["channels", "shuffle"]}]}
    assert asked(grids, "method=camera_p") == [["method=camera_p"]]
    weaker = {"method": "camera_q_dagger", "method.split": "shuffle"}
    assert asked({"a": [{"method": "random"}]}, params=weaker) == [["method=random"]]


def test_other_groups_keep_their_settings():
    sizes = {"a": [{"calibration.samples": [16, 32]}]}
    assert asked(sizes, "calibration=c4") == [
        ["calibration.samples=16", "calibration=c4"],
        ["calibration.samples=32", "calibration=c4"],
    ]


@pytest.mark.parametrize("grid", [{"method": "dense"}, "method", ["dense"]])
def test_a_grid_that_is_no_list_of_mappings_is_refused(grid):
    with pytest.raises(HydraException, match=r"hydra\.sweeper\.grids\.mine must be a list"):
        asked({"mine": grid})


def test_a_wrong_grid_is_said_in_one_sentence(capsys, tmp_path):
    assert command("-m", f"output={tmp_path}", "+hydra.sweeper.grids.mine={method: dense}") == 1
    said = "".join(capsys.readouterr())
    assert "grids.mine must be a list" in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_what_ends_in_the_same_folder_is_one_job():
    jobs = jobs_of("method=dense,random", "sparsity=0.2,0.4", "alpha=0,1")
    assert [job.overrides[:2] for job in jobs] == [
        ["method=dense", "sparsity=0.2"],
        ["method=random", "sparsity=0.2"],
        ["method=random", "sparsity=0.4"],
    ]
    assert len({job.run for job in jobs}) == 3


def test_a_run_knows_every_grid_that_asks_for_it():
    grids = {"one": [{"method": "dense"}], "two": [{"method": ["dense", "magnitude"]}]}
    dense, magnitude = jobs_of(grids=grids)
    assert dense.grids == ["one", "two"] and magnitude.grids == ["two"]


def test_a_refused_request_is_a_job_that_says_why():
    refused = jobs_of("+sparsty=0.2,0.3", "method=dense")
    assert [job.run for job in refused] == [None, None]
    assert all("sparsty is not a key" in job.refused for job in refused)
    assert not any(job.is_locked for job in refused)
    (missing,) = jobs_of("model.path=???")
    assert missing.run is None and "model.path" in missing.refused


def test_a_plan_is_read_back_wherever_the_folder_is_moved(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    jobs = jobs_of(f"output={before}", "method=dense,magnitude")
    folder = before / "sweeps" / "now"
    folder.mkdir(parents=True)
    write_plan(jobs, folder, before)
    assert read_plan(folder) == jobs
    before.rename(after)
    moved = read_plan(after / "sweeps" / "now")
    assert [job.run for job in moved] == [after / "runs" / job.run.name for job in jobs]
