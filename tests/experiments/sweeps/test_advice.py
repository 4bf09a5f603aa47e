"""What a sweep says before its first job starts."""

import pytest

from experiments.sweeps.jobs import SweepJob
from experiments.sweeps.planning.advice import advice
from tests.helpers.runs.planning import grids_of, jobs_of


def said(*arguments, preset=None):
    grids = grids_of(preset) if preset else {}
    jobs = jobs_of(*arguments, *([f"experiment={preset}"] if preset else []))
    return advice(jobs, grids, arguments)


def test_a_study_without_its_dense_row_has_nothing_to_compare_with():
    sentence, same = said("method=heapr", preset="main")
    assert sentence.startswith("method=heapr also replaces the dense row of main: there is nothing")
    assert "method=dense,heapr" in sentence
    assert same == "1 of 4 jobs is the same as others."  # its default sparsity is one of main's
    assert (
        said("method=dense,heapr", preset="main")[0]
        == "method=dense,heapr replaces camera_p of main."
    )


def test_values_that_a_study_compares_are_missed():
    assert "alpha=0.5 replaces" in said("alpha=0.5", preset="alpha")[0]
    assert said(preset="main") == []
    assert said("seed=3", "calibration=c4", preset="main") == []


def test_jobs_that_are_the_same_are_told_with_the_settings_that_their_methods_ignore():
    sentences = said("method=random,dense,camera_p", "alpha=0.1,0.5,0.9")
    assert sentences == ["4 of 9 jobs are the same as others: random and dense use no alpha."]


@pytest.mark.parametrize("count", [1, 2])
def test_refusals_are_listed_with_what_was_asked(count):
    refused = [SweepJob([f"sparsity={n}"], [], refused=f"no {n}.") for n in range(count)]
    verb = "is" if count == 1 else "are"
    assert advice([SweepJob(["a=1"], []), *refused], {}, []) == [
        f"{count} of {count + 1} jobs {verb} refused, the others run:",
        *(f"  sparsity={n}: no {n}." for n in range(count)),
    ]
