"""Who is marked: methods only, ties within one standard error, nobody where all tie."""

import math

import numpy as np
import pytest

from experiments.records.files import OutputFolder
from experiments.tables.aggregate import over_seeds
from experiments.tables.best import best_at_each_ratio, is_tied, places
from experiments.tables.pages import paper_page
from experiments.tables.rows import read_runs
from tests.helpers.runs.run_folders import add


def run(method, **scores):
    return {"method": method, "sparsity": 20.0, "bits": None, "n": 1} | scores


def means_of(output):
    return over_seeds(read_runs(OutputFolder(output).runs()))


def test_the_original_and_floors_have_no_place():
    scores = {"dense": 90, "random": 80, "magnitude": 70, "rtn": 85, "naee": 60, "camera_p": 50}
    runs = [run(method, average=float(score)) for method, score in scores.items()]
    assert places(runs, "average", "high") == [0, 0, 0, 0, 1, 2]


def test_a_users_own_method_has_a_place():
    runs = [run("my_method", average=3.0), run("camera_p", average=2.0), run("naee", average=1.0)]
    assert places(runs, "average", "high") == [1, 2, 0]


def test_a_method_by_itself_has_no_place():
    runs = [run("dense", average=9.0), run("random", average=1.0), run("naee", average=5.0)]
    assert places(runs, "average", "high") == [0, 0, 0]


@pytest.mark.parametrize("best", ["low", "high"])
def test_whoever_is_within_one_standard_error_shares_the_place(best):
    sign = 1 if best == "high" else -1
    scores = [50.0, 49.1, 48.9, 48.5, 40.0]
    runs = [run("naee", boolq=sign * score, boolq_se=1.0) for score in scores]
    assert places(runs, "boolq", best) == [1, 1, 2, 2, 0]


def test_where_all_tie_nobody_is_marked():
    runs = [run("naee", boolq=50.0 + n, boolq_se=7.0) for n in range(5)]
    assert places(runs, "boolq", "high") == [0] * 5


def test_without_known_errors_only_equal_digits_tie():
    runs = [run("naee", c4=value) for value in (2.881, 2.884, 2.89, None, 3.0)]
    assert places(runs, "c4", "low") == [1, 1, 2, 0, 0]


def test_the_error_of_two_perplexities_is_that_of_their_difference_on_the_same_blocks():
    draw = np.random.default_rng(0)
    text = draw.normal(2.0, 0.5, 64)  # blocks differ far more than models do
    noise = draw.normal(0.0, 0.01, 64)
    error = np.std(noise, ddof=1) / 8

    def model(shift, blocks):
        return run("naee", c4=math.exp(2.0 + shift), _blocks={"c4": [*blocks]})

    best = model(0.0, text)
    assert is_tied(best, model(0.9 * error, text + noise), "c4")
    assert not is_tied(best, model(1.1 * error, text + noise), "c4")
    other = run("naee", c4=math.exp(2.0 + 3 * error), c4_se=1.0, _blocks={"c4": []})
    assert is_tied(best | {"c4_se": 1.0}, other, "c4")  # of other blocks: each one's own error


@pytest.mark.parametrize(("score", "unit"), [("kl_c4", 1), ("agreement_c4", 100)])
def test_distances_from_the_dense_model_are_compared_on_the_same_blocks(score, unit):
    draw = np.random.default_rng(0)
    text, noise = draw.normal(0.5, 0.2, 64), draw.normal(0.0, 0.01, 64)
    error = np.std(noise, ddof=1) / 8

    def model(shift, blocks):
        return run("naee", **{score: unit * (0.5 + shift)}, _blocks={score: [*blocks]})

    best = model(0.0, text)
    assert is_tied(best, model(0.9 * error, text + noise), score)
    assert not is_tied(best, model(1.1 * error, text + noise), score)


def paired_error(one, two):
    d = np.subtract(one, two, dtype=float)
    return np.sqrt(np.sum((d - d.mean()) ** 2) / (len(d) - 1) / len(d))


def test_tasks_are_compared_on_the_same_questions():
    draw = np.random.default_rng(0)
    ours = {"boolq": draw.integers(0, 2, 400), "piqa": draw.integers(0, 2, 100)}
    theirs = {  # they answer a few questions otherwise, most of these wrong
        task: np.where(draw.random(len(right)) < 0.05, draw.random(len(right)) < 0.3, right)
        for task, right in ours.items()
    }
    errors = {task: 100 * paired_error(ours[task], theirs[task]) for task in ours}
    for task, right in ours.items():
        assert errors[task] < 100 * np.std(right, ddof=1) / np.sqrt(len(right)) / 2
    errors["average"] = math.hypot(*errors.values()) / 2
    for score, error in errors.items():
        best = run("naee", **{score: 50.0, f"{score}_se": 9.0}, _questions=ours)
        near, far = (
            run("reap", **{score: 50.0 - share * error}, _questions=theirs) for share in (0.9, 1.1)
        )
        assert is_tied(best, near, score) and not is_tied(best, far, score)


OURS = {"boolq": np.array([1, 0, 1, 1]), "piqa": np.array([1, 0])}
UNLIKE = {
    "a run of before": {},
    "a task without answers": OURS | {"boolq": None},
    "fewer questions": OURS | {"boolq": np.array([1, 0, 1])},
}


@pytest.mark.parametrize("theirs", UNLIKE.values(), ids=UNLIKE)
def test_of_other_questions_the_error_of_the_best_score_counts(theirs):
    for score in ("boolq", "average"):
        best = run("naee", **{score: 50.0, f"{score}_se": 1.0}, _questions=OURS)
        near, far = (run("reap", **{score: 50.0 - d}, _questions=theirs) for d in (0.9, 1.1))
        assert is_tied(best, near, score) and not is_tied(best, far, score)


def test_answers_are_read_from_the_runs_and_averaged_over_seeds(tmp_path):
    for seed, right in ((1, "0110"), (2, "0011")):
        told = {"tasks": {"boolq": 50.0}, "right": {"boolq": right}}
        add(tmp_path, f"s{seed}", "naee", 0.2, seed=seed, **told)
    add(tmp_path, "before", "reap", 0.2, tasks={"boolq": 50.0})
    of_method = {row["method"]: row for row in means_of(tmp_path).to_dict("records")}
    assert of_method["naee"]["_questions"]["boolq"].tolist() == [0.0, 0.5, 1.0, 0.5]
    assert of_method["reap"]["_questions"] == {"boolq": None}


def test_spread_over_seeds_counts_too():
    best = run("naee", average=50.0, average_se=0.0, average_std=3.0) | {"n": 9}
    other = run("reap", average=48.9, average_se=0.0, average_std=4.0) | {"n": 16}
    # √(3² / 9 + 4² / 16) = √2
    assert is_tied(best, other, "average")
    assert not is_tied(best, other | {"average": 48.5}, "average")


def test_blocks_of_several_seeds_are_averaged(tmp_path):
    for seed, blocks in ((1, [1.0, 2.0]), (2, [3.0, 6.0])):
        add(tmp_path, f"s{seed}", "naee", 0.2, seed=seed, blocks={"wikitext2": blocks})
    (row,) = means_of(tmp_path).to_dict("records")
    assert row["_blocks"]["wikitext2"].tolist() == [2.0, 4.0]
    assert row["n"] == 2


@pytest.fixture
def output(tmp_path):
    add(tmp_path, "dense", "dense", tasks={"boolq": 60.0})
    scores = {"camera_p": 50.0, "reap": 49.0, "naee": 40.0, "random": 55.0}
    for method, score in scores.items():
        tasks, texts = {"boolq": score}, {"wikitext2": 100 / score}
        add(tmp_path, method, method, 0.4, tasks=tasks, perplexity=texts, questions=1001)
    add(tmp_path, "alone", "camera_p", 0.2, tasks={"boolq": 58.0})
    return tmp_path


def test_the_page_marks_ties_and_says_by_what_rule(output):
    page = paper_page(read_runs(OutputFolder(output).runs()))
    table = page.tables[0]
    at = [c.header for c in table.columns].index("Avg↑")
    found = {row.cells[1].text: row.cells[at].place for row in table.groups[-1]}
    assert found == {"Random": 0, "NAEE": 2, "REAP": 1, "Camera-P": 1}
    assert any("within one standard error" in note for note in page.notes)


def test_the_best_of_a_ratio_are_all_that_are_not_distinguishable(output):
    ((block, (best,)),) = best_at_each_ratio(means_of(output))
    assert block.study == "main"
    assert (best.ratio, best.measure, best.dense) == ("40%", "average", 60.0)
    assert [leader.method for leader in best.leaders] == ["Camera-P", "REAP"]
    assert best.leaders[0].error == pytest.approx(100 * math.sqrt(0.25 / 1000))
    assert best.leaders[0].size == pytest.approx(1.0) and best.distinguished


def test_the_best_by_perplexity_names_the_data(tmp_path):
    for method, score in (("naee", 3.0), ("reap", 4.0)):
        texts = {"wikitext2": score}
        add(tmp_path, method, method, 0.4, tasks={}, perplexity=texts, data="embedded")
    ((_, (best,)),) = best_at_each_ratio(means_of(tmp_path))
    assert best.measure == "perplexity of tiny encyclopaedia"
    assert [leader.method for leader in best.leaders] == ["NAEE"]


def test_no_best_of_one_method_nor_of_nothing(tmp_path):
    for alpha in (0.0, 0.5):
        add(tmp_path, f"a{alpha}", "camera_p", 0.4, alpha=alpha)
    add(tmp_path, "floor", "random", 0.4)
    assert list(best_at_each_ratio(means_of(tmp_path))) == []
    assert list(best_at_each_ratio(means_of(tmp_path / "nothing"))) == []
