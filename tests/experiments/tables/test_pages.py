"""Pages: which runs stand together, what stands out, what is said below."""

import json

import pytest

from experiments.records.files import OutputFolder
from experiments.tables.pages import paper_page
from experiments.tables.rows import read_runs
from tests.helpers.runs.run_folders import add


def page_of(output, **options):
    return paper_page(read_runs(OutputFolder(output).runs()), **options)


def texts(table, column):
    """The column's cells by group, as they are read."""
    place = [column.header for column in table.columns].index(column)
    return [[row.cells[place].text for row in group] for group in table.groups]


def table_of(page, title):
    return {table.title: table for table in page.tables}[title]


@pytest.fixture
def output(tmp_path):
    add(tmp_path, "a", "dense", tasks={"boolq": 60.0})
    for sparsity in (0.2, 0.4):
        for number, method in enumerate(("camera_p", "naee", "random")):
            score = 50 - 10 * number - 50 * sparsity
            tasks, texts = {"boolq": score}, {"wikitext2": 10.0 + number}
            add(tmp_path, f"{method}{sparsity}", method, sparsity, tasks=tasks, perplexity=texts)
    return tmp_path


def test_rows_are_grouped_by_ratio_below_the_dense_one(output):
    table = page_of(output).tables[0]
    assert texts(table, "Method") == [["Dense"], *2 * [["Random", "NAEE", "Camera-P"]]]
    assert texts(table, "Ratio") == [["–"], ["20%"] * 3, ["40%"] * 3]


def test_scores_and_costs_are_tables_of_their_own(output):
    scores, costs = page_of(output).tables
    assert "BoolQ↑" in [c.header for c in scores.columns]
    assert {"MB", "Minutes", "Model removed"} <= {c.header for c in costs.columns}
    assert "BoolQ↑" not in [c.header for c in costs.columns]
    assert texts(costs, "Method") == 2 * [["Random", "NAEE", "Camera-P"]]
    assert costs.caption == "Dense: 1.5 MB."


def test_models_ways_of_measuring_and_meanings_of_sparsity_stand_apart(output):
    add(output, "of", "camera_p", 0.2, sparsity_of="model")
    add(output, "bits", "gptq", bits=2.5)
    add(output, "fewer", "gptq", bits=2.25)
    add(output, "full", "camera_p", 0.2, evaluation={"limit": None})
    quick = " (32 blocks of each text, 100 questions of 2 tasks)"
    full = " (32 blocks of each text, all questions of 2 tasks)"
    add(output, "other", "camera_p", 0.2, model="other")
    page = page_of(output)
    titles = [table.title for table in page.tables if not table.title.endswith(": cost")]
    assert titles == [
        "Pruning: other, sparsity of the experts",
        f"Pruning: tiny_moe, sparsity of the experts{quick}",
        f"Pruning: tiny_moe, sparsity of the whole model{quick}",
        f"Pruning: tiny_moe, sparsity of the experts{full}",
        f"Quantisation: tiny_moe{quick}",
    ]
    quantised = table_of(page, titles[4])
    assert texts(quantised, "Method") == [["Dense"], ["GPTQ"], ["GPTQ"]]
    assert texts(quantised, "Ratio") == [["–"], ["2.5 bits"], ["2.25 bits"]]
    assert texts(table_of(page, titles[3]), "Method") == [["Camera-P"]]
    labels = [table.label for table in page.tables]
    assert len(set(labels)) == len(labels)


def test_a_page_of_one_run_and_of_none(tmp_path):
    assert page_of(tmp_path).tables == []
    add(tmp_path, "a", "dense")
    titles = [table.title for table in page_of(tmp_path).tables]
    assert titles == ["Pruning: tiny_moe", "Pruning: tiny_moe: cost"]


def test_the_average_stands_first_and_arrows_say_which_end_is_the_best(output):
    headers = [c.header for c in page_of(output, delta="dense").tables[0].columns]
    assert headers == ["Ratio", "Method", "Avg↑", "Δ", "Wiki2↓", "C4↓", "BoolQ↑"]


def test_a_missed_ratio_is_told_beside_the_scores(output):
    add(output, "missed", "reap", 0.2)
    file = output / "runs" / "missed" / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["sparsity"]["moe"] = 0.175
    file.write_text(json.dumps(metrics))
    told = texts(page_of(output).tables[0], "Experts removed")
    assert told[1] == ["20.0%", "20.0%", "17.5%", "20.0%"]


def test_errors_are_of_the_seeds_of_the_tasks_or_none(output):
    scores = {"boolq": 44.0}
    add(output, "again", "camera_p", 0.2, seed=7, tasks=scores, perplexity={"wikitext2": 12.0})

    def behind(**options):
        table = page_of(output, **options).tables[0]
        headers = [c.header for c in table.columns]
        row = next(r for r in table.groups[1] if r.cells[1].text == "Camera-P").cells
        return {name: row[headers.index(name)].error for name in ("Wiki2↓", "BoolQ↑", "Avg↑")}

    # Two values a and b: |a - b| / √2.
    assert behind() == {"Wiki2↓": "1.41", "BoolQ↑": "2.8", "Avg↑": "2.8"}
    assert behind(errors="se") == {"Wiki2↓": "", "BoolQ↑": "4.9", "Avg↑": "4.9"}
    assert set(behind(errors="none").values()) == {""}
    assert "Seeds" in [c.header for c in page_of(output).tables[0].columns]


def test_delta_is_the_averages_difference_to_dense(output):
    table = page_of(output, delta="dense").tables[0]
    assert texts(table, "Δ") == [["+0.0"], ["−40.0", "−30.0", "−20.0"], ["−50.0", "−40.0", "−30.0"]]
    assert "Δ" not in [c.header for c in page_of(output).tables[0].columns]


def test_deltas_error_is_that_of_the_same_questions(tmp_path):
    answers = {"dense": {"boolq": "1111100000"}, "camera_p": {"boolq": "1111000001"}, "naee": {}}
    for method, told in answers.items():
        ratio = None if method == "dense" else 0.4
        add(tmp_path, method, method, ratio, tasks={"boolq": 50.0}, right=told)

    def behind(errors):
        table = page_of(tmp_path, delta="dense", errors=errors).tables[0]
        at = [column.header for column in table.columns].index("Δ")
        return [[row.cells[at].error for row in group] for group in table.groups]

    # differences of 1, -1 and eight zeros: √(2 / 9 / 10)
    assert behind("se") == [["0.0"], ["", "14.9"]]
    assert behind("std") == [[""], ["", ""]]


def test_delta_to_a_method_is_at_the_same_ratio(output):
    table = page_of(output, delta="camera_p").tables[0]
    methods, deltas = texts(table, "Method"), texts(table, "Δ")
    assert deltas[0] == ["–"]  # the dense model has no ratio
    for group, shown in zip(methods[1:], deltas[1:], strict=True):
        assert shown[group.index("Camera-P")] == "+0.0"
        assert sorted(shown) != ["+0.0"] * len(shown)


def test_delta_needs_a_dense_run_of_the_same_measurement(tmp_path):
    add(tmp_path, "a", "dense", evaluation={"limit": 5})
    add(tmp_path, "b", "camera_p", 0.2)
    for table in page_of(tmp_path, delta="dense").tables:
        if "Camera-P" in texts(table, "Method")[0]:
            assert "Δ" not in [c.header for c in table.columns]


def test_what_has_no_result_is_a_note_with_its_reason(output):
    add(output, "e", "camera_p", 0.6, error="sparsity=0.6 is | too much.")
    add(output, "f", "gptq", bits=2.25, done=False)
    page = page_of(output)
    assert "tiny_moe, Camera-P, 60%, seed=1234: failed: sparsity=0.6 is | too much." in page.notes
    assert "tiny_moe, GPTQ, 2.25 bits, seed=1234: unfinished" in page.notes
    assert not any("GPTQ" in str(texts(table, "Method")) for table in page.tables)


def test_a_speed_is_a_score_of_which_more_is_better(tmp_path):
    for name, ratio in (("slow", 1.1), ("fast", 1.3)):
        speed = {"1": {"decode": ratio}, "16": {"decode": 2 * ratio}}
        add(tmp_path, name, name, 0.2, tasks={}, speed=speed)
    table = page_of(tmp_path).tables[0]
    assert texts(table, "Decode ×↑") == [["1.30", "1.10"]]
    assert texts(table, "Decode@16 ×↑") == [["2.60", "2.20"]]
    at = [c.header for c in table.columns].index("Decode ×↑")
    assert [row.cells[at].place for row in table.groups[0]] == [1, 2]


def test_settings_are_in_the_order_of_their_numbers(tmp_path):
    for samples in (128, 16, 1024, 64):
        sizes = {"samples": samples, "length": 2048}
        add(tmp_path, f"s{samples}", "camera_p", 0.2, calibration=sizes)
    page = page_of(tmp_path)
    table = table_of(page, "Ablation: calibration size: tiny_moe, sparsity of the experts")
    (settings,) = texts(table, "Settings")
    assert settings == [f"samples={number}" for number in (16, 64, 128, 1024)]


def test_pruned_and_quantised_forms_are_compared_in_one_table(tmp_path):
    asked = {"studies": ["speed"], "tasks": {}, "perplexity": {}}
    for place, widths in enumerate(("ragged", "uniform")):
        speed = {"1": {"prefill": 1.0, "decode": 1.25 + place}}
        add(tmp_path, widths, "camera_p", 0.4, expert_widths=widths, speed=speed, **asked)
    speed = {"1": {"prefill": 0.5, "decode": 0.25}}
    add(tmp_path, "packed", "camera_q", bits=2.25, speed=speed, **asked)
    table = page_of(tmp_path).tables[0]
    assert table.title == "Speed: tiny_moe, sparsity of the experts"
    assert texts(table, "Ratio") == [["40%", "40%"], ["2.25 bits"]]
    assert texts(table, "Settings")[0] == ["expert_widths=ragged", "expert_widths=uniform"]
    assert texts(table, "Decode ×↑") == [["1.25", "2.25"], ["0.25"]]


def test_ways_of_measuring_are_told_in_words(tmp_path):
    add(tmp_path, "a", "camera_p", 0.2)
    nothing = {"perplexity": [], "tasks": []}
    add(tmp_path, "b", "camera_p", 0.4, evaluation=nothing | {"speed": {"batch_sizes": [1]}})
    add(tmp_path, "c", "camera_p", 0.6, evaluation=nothing)
    ways = {table.title.partition("(")[2] for table in page_of(tmp_path).tables}
    assert {way.partition(")")[0] for way in ways} == {
        "32 blocks of each text, 100 questions of 2 tasks",
        "speed",
        "nothing measured",
    }


def test_a_damaged_run_is_a_note_and_the_seeds_of_others_stay_numbers(tmp_path):
    add(tmp_path, "good", "camera_p", 0.2, seed=7)
    add(tmp_path, "late", "camera_p", 0.4, seed=8, done=False)
    (add(tmp_path, "empty", "camera_p", 0.3) / "settings.json").write_text("")
    (add(tmp_path, "cut", "camera_p", 0.5) / "metrics.json").write_text('{"spars')
    notes = "\n".join(page_of(tmp_path).notes)
    assert "empty, unknown, –: damaged: settings.json" in notes
    assert "seed=1234: damaged: metrics.json" in notes
    assert "seed=8: unfinished" in notes


def test_two_models_of_one_name_are_told_apart(tmp_path):
    for name, weights in (("a", "0123456789abcdef"), ("b", "fedcba9876543210")):
        folder = add(tmp_path, name, "camera_p", 0.2)
        stored = json.loads((folder / "settings.json").read_text())
        stored["identity"]["model"] = weights
        (folder / "settings.json").write_text(json.dumps(stored))
    titles = [table.title for table in page_of(tmp_path).tables]
    assert len(set(titles)) == len(titles) == 4
    assert any("weights=01234567" in title for title in titles)
