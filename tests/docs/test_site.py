"""The pages are a site without a warning, and drawings say what the tables say."""

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec

import pytest

from experiments.records.files import OutputFolder
from experiments.tables.rows import read_runs
from tests.helpers.runs.documents import DOCS, PAGES, README, ROOT, text_of
from tests.helpers.runs.run_folders import add

DRAWINGS = sorted(file for file in (DOCS / "drawings").glob("*.py") if file.name != "style.py")
TEXT = re.compile(r"<(?:text|dc:description)[^>]*>(.*?)</", re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as `make docs` does; a warning ends it."""
    if missing := [name for name in ("mkdocs", "material", "mkdocstrings") if not find_spec(name)]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr + done.stdout
    return folder


def test_the_site_has_every_page_and_fetches_nothing(site):
    for name in PAGES:
        page = site / name.replace("README.md", "index.html").replace(".md", ".html")
        html = page.read_text(encoding="utf-8")
        assert re.findall(r'src="https?:[^"]*"|<link[^>]*href="https?:[^"]*"', html) == [], name


def test_the_site_has_the_docstrings(site):
    html = (site / "api.html").read_text(encoding="utf-8")
    assert "Compress a model, one layer in memory at a time" in html and "sparsity" in html


def test_links_out_of_the_pages_are_paths_on_the_site(site):
    html = (site / "architecture.html").read_text(encoding="utf-8")
    assert "camera/moe/families/__init__.py" in html and 'href="../camera' not in html


@pytest.mark.parametrize("file", DRAWINGS, ids=lambda file: file.stem)
def test_a_drawing_is_current(file, tmp_path):
    code = f"import runpy; from pathlib import Path; runpy.run_path({str(file)!r})"
    drawn = f"{code}['draw'](Path({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(file.parent), "MPLBACKEND": "agg"}
    subprocess.run([sys.executable, "-c", drawn], env=environment, check=True)
    (new,) = tmp_path.glob("*.svg")
    words = TEXT.findall(text_of(new))
    assert len(words) > 5
    assert TEXT.findall(text_of(DOCS / "figures" / new.name)) == words, f"python {file}"


def test_what_a_command_prints_is_put_below_it():
    blocks = runpy.run_path(str(DOCS / "printed.py"))
    page = "<!-- printed by: echo 1; echo 2 -->\n```text\nold\n```\n\nrest\n"
    assert blocks["printed"](page) == page.replace("old", "1\n2")
    found = blocks["BLOCK"].findall(text_of(README))
    assert len(found) > 1 and all(command.startswith("python ") for _, command, _ in found)
    assert "```text\n```" not in text_of(README)
    with pytest.raises(SystemExit, match="false"):
        blocks["printed"](page.replace("echo 1; echo 2", "false"))


def test_a_table_of_a_page_is_made_of_the_runs_of_a_folder(tmp_path):
    add(tmp_path, "dense", "dense")
    add(tmp_path, "p", "camera_p", 0.4, tasks={"boolq": 40.0, "arc_easy": 50.0})
    add(tmp_path, "n", "naee", 0.4)
    runs = read_runs(OutputFolder(tmp_path).runs())
    filled = runpy.run_path(str(DOCS / "measured.py"))["filled"]
    block = "<!-- measured: STUDY dense,camera_p ratio method average size_mb -->"
    page = f"{block}\nold\n<!-- /measured -->\nrest\n"
    lines = filled(page.replace("STUDY", "main"), runs).splitlines()
    assert lines[1:3] == ["| Ratio | Method | Avg↑ | MB |", "| --- | --- | ---: | ---: |"]
    assert lines[3:5] == ["| – | Dense | 37.5 | 1.5 |", "| 40% | Camera-P | 45.0 | 1.5 |"]
    assert lines[6].startswith("Standard error of the average: ") and lines[-1] == "rest"
    with pytest.raises(SystemExit, match="no study alpha"):
        filled(page.replace("STUDY", "alpha"), runs)
    assert "<!-- measured: main " in text_of(README)
