"""What `pytest -m gpu` runs and writes, at a tiny scale and without a card."""

import json
from types import SimpleNamespace

import pytest

from tests.gpu.layers import FORMS, compressed, speeds, write_layers
from tests.helpers.machine.gpu_report import (
    JSON,
    MARKDOWN,
    NO_CARD,
    PROPERTY,
    GpuReport,
    Measured,
    real_card,
)

ABOUT = {"card": "Some Card", "memory_gb": 40.0, "torch": "2.13", "cuda": "12.8"}


def outcome(outcome: str, when: str = "call", reason: str = "", rows=()) -> pytest.TestReport:
    skipped = ("file.py", 1, f"Skipped: {reason}")
    return pytest.TestReport(
        nodeid=f"test_{outcome}",
        location=("file.py", 1, "test"),
        keywords={},
        outcome=outcome,
        longrepr=skipped if outcome == "skipped" else None,
        when=when,
        user_properties=[("other", 1), *((PROPERTY, row) for row in rows)],
    )


@pytest.fixture
def reports() -> list[pytest.TestReport]:
    fast = Measured("decode", "ragged", 1.2345678, "×", "1.25")
    return [
        outcome("passed", "setup"),
        outcome("passed", rows=[fast, Measured("memory", "ragged", 12.0, "GB")]),
        outcome("passed", "teardown"),
        outcome("failed", rows=[Measured("decode", "packed", 0.5, "×")]),
        outcome("skipped", "setup", "no fake"),
    ]


def test_numbers_and_outcomes_are_written_as_json_and_tables(reports, tmp_path):
    report = GpuReport(tmp_path, ABOUT)
    for each in reports:
        report.pytest_runtest_logreport(each)
    report.pytest_sessionfinish()
    content = json.loads((tmp_path / JSON).read_text())
    assert content["card"] == "Some Card"
    assert content["outcomes"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert content["failed"] == ["test_failed"]
    assert [row["value"] for row in content["measured"]] == [1.2345678, 12.0, 0.5]
    lines = (tmp_path / MARKDOWN).read_text().splitlines()
    assert "Some Card (40.0 GB), torch 2.13, CUDA 12.8; 1 failed, 1 passed, 1 skipped" in lines[0]
    assert lines[2:6] == [
        "| decode | | | goal |",
        "|---|---:|---|---:|",
        "| ragged | 1.235 | × | 1.25 |",
        "| packed | 0.5 | × |  |",
    ]
    assert "| ragged | 12 | GB |  |" in lines


def test_nothing_is_written_without_a_card(reports, tmp_path):
    report = GpuReport(tmp_path, None)
    for each in reports:
        report.pytest_runtest_logreport(each)
    report.pytest_sessionfinish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("about", [ABOUT, None])
def test_the_output_ends_with_where_the_report_is_or_why_there_is_none(about, tmp_path):
    told: list[str] = []
    GpuReport(tmp_path, about).pytest_terminal_summary(SimpleNamespace(write_line=told.append))
    written = f"{tmp_path / JSON} and {MARKDOWN} are written."
    assert told == [written if about else f"no {JSON}: {NO_CARD}."]


def test_a_fake_is_no_card(fake):
    assert real_card() is None


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_layers(tmp_path_factory.mktemp("layers"), 1, 16, 64, "olmoe_1b_7b")


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_made_and_run_in_every_form(form, source, tmp_path):
    result = compressed(source, form, tmp_path / "out", "cpu", 8, 64)
    assert result.expected_memory_bytes > 0 and result.seconds["calibrate"] > 0
    counts = dict(batch_sizes=(1,), prompt_length=4, new_tokens=1, repeats=1)
    found = speeds(source, tmp_path / "out", "cpu", **counts)
    assert {phase: row["ratio"] > 0 for phase, row in found["1"].items()} == {
        "prefill": True,
        "decode": True,
    }
