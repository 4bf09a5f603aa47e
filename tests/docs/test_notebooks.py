"""The notebooks run from top to bottom, and stand in git with what they show."""

import ast
import re

import nbformat
import pytest
from nbclient import NotebookClient

from experiments.config.location import CONF

NOTEBOOKS = sorted((CONF.parent / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)#:]+)\)")
BY_NAME = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the notebooks work: the texts that the first one writes serve the others."""
    return tmp_path_factory.mktemp("notebooks")


def test_there_are_three():
    assert [file.stem[0] for file in NOTEBOOKS] == ["1", "2", "3"]


@BY_NAME
def test_a_notebook_runs_and_shows_something(file, folder):
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    # A busy machine takes its time.
    NotebookClient(notebook, startup_timeout=300, timeout=600, resources=resources).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert "image/png" in shown and "text/html" in shown
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


@BY_NAME
def test_a_notebook_in_git_shows_what_it_does(file):
    cells = code_cells(nbformat.read(file, as_version=nbformat.NO_CONVERT))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "image/png" in [kind for output in outputs for kind in output.get("data", {})]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert file.stat().st_size < 300_000
    assert str(CONF.parent) not in file.read_text(encoding="utf-8")


@BY_NAME
def test_cells_only_call_and_plot(file):
    for cell in code_cells(nbformat.read(file, as_version=4)):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert not [part for part in ast.walk(ast.parse(cell.source)) if isinstance(part, kinds)]
        assert len(cell.source.splitlines()) <= 25


@BY_NAME
def test_links_lead_somewhere(file):
    cells = nbformat.read(file, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for link in LINK.findall(text):
        assert (file.parent / link).exists(), link
