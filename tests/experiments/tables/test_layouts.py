"""A page on the terminal, in Markdown, in LaTeX and in HTML."""

import ast
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from camera.evaluation.tasks.names import NINE_TASKS
from experiments.records.files import OutputFolder
from experiments.tables import layouts
from experiments.tables.layouts.cells import Cell, Column
from experiments.tables.layouts.html import to_html
from experiments.tables.layouts.latex import to_latex
from experiments.tables.layouts.markdown import to_markdown
from experiments.tables.layouts.terminal import print_page
from experiments.tables.pages import Page, Row, Table, paper_page
from experiments.tables.rows import read_runs
from tests.helpers.runs.run_folders import add

TABLES = Path(layouts.__file__).parents[1]
ODD = r"50% & more_of {this} $\x$ #1 ~ ^ <b> | α ≠ é 語"


@pytest.fixture
def page(tmp_path):
    add(tmp_path, "a", "dense")
    for number, method in enumerate(("camera_p", "reap", "random", "d2_moe")):
        scores = {"boolq": 40.0 - 10 * number, "arc_easy": 50.0}
        add(tmp_path, method, method, 0.4, tasks=scores, perplexity={"wikitext2": 10.0 + number})
    add(tmp_path, "again", "camera_p", 0.4, seed=7, tasks={"boolq": 42.0, "arc_easy": 50.0})
    add(tmp_path, "plain", "naee", 0.4, search="auto")
    add(tmp_path, "odd", "naee", 0.4, search=ODD)
    add(tmp_path, "odd2", "camera_p", 0.2, error=ODD)
    return paper_page(read_runs(OutputFolder(tmp_path).runs()), delta="dense")


def test_markdown_has_a_cell_for_every_header(page):
    lines = [line for line in to_markdown(page).splitlines() if line.startswith("|")]
    columns = [len(table.columns) for table in page.tables for _ in table.groups for _ in _]
    rows = [line.replace("\\|", "") for line in lines]
    assert sorted(line.count("|") - 1 for line in rows) == sorted(
        columns + [len(table.columns) for table in page.tables for _ in range(2)]
    )


def test_markdown_marks_the_best_and_shows_the_ratio_once(page):
    lines = to_markdown(page).splitlines()
    best = next(line for line in lines if "| Camera-P |" in line)
    assert best.startswith("|  |") and "**41.0** ± 1.4" in best
    others = [line for line in lines if "| REAP |" in line or "| Random |" in line]
    assert others and any(line.startswith("| 40% |") for line in others)
    assert any("<ins>30.0</ins>" in line for line in others)


def test_markdown_keeps_what_is_said_in_one_piece(page):
    text = to_markdown(page)
    assert r"&lt;b> \| α" in text and "<b>" not in text
    assert "\n- tiny_moe, Camera-P, 20%" in text


def test_latex_is_escaped_and_has_rules(page):
    text = to_latex(page)
    for part in (r"\toprule", r"\bottomrule", r"D$^2$-MoE", r"40\%", r"\textbf{41.0}"):
        assert part in text
    assert r"50\% \& more\_of \{this\} \$\textbackslash{}x\$ \#1" in text
    tables = text.count(r"\begin{tabular}")
    # One below the headers, one between each two groups.
    assert text.count(r"\midrule") == sum(len(table.groups) for table in page.tables)
    for table in page.tables:
        assert f"\\label{{{table.label}}}" in text
    assert text.count(r"\caption{") == len(page.tables)
    assert r"Wiki2$\downarrow$" in text and r"BoolQ$\uparrow$" in text
    assert tables == text.count(r"\end{tabular}") == len(page.tables)


def test_latex_has_every_letter_that_tables_are_made_of():
    shown = [*TABLES.glob("names/*.py"), *TABLES.glob("layouts/c*.py")]
    assert len(shown) > 5
    for file in shown:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        words = " ".join(text for text in texts if isinstance(text, str)).replace("?", "")
        table = Table(words, [Column("method")], [[Row([Cell("x")])]])
        assert "?" not in to_latex(Page([table], [])), file


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_latex_compiles(page, tmp_path):
    document = (
        r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
        f"\n{to_latex(page)}\n\\end{{document}}\n"
    )
    (tmp_path / "page.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "page.pdf").exists()


class Cells(HTMLParser):
    """The tags of a fragment, and its cells by table and row."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[tuple[str, str]]] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append((dict(attrs)["data-value"], ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            value, text = self.rows[-1][-1]
            self.rows[-1][-1] = (value, text + data)


def test_html_nests_and_carries_the_values(page):
    parser = Cells()
    parser.feed(to_html(page))
    assert parser.open == []
    rows = [row for row in parser.rows if row]
    expected = [row for table in page.tables for group in table.groups for row in group]
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        for (value, text), cell in zip(row, wanted.cells, strict=True):
            assert text.startswith(cell.text)
            assert value == ("" if cell.value is None else str(cell.value))


def test_html_escapes_what_comes_from_files(page):
    text = to_html(page)
    assert "<b>" not in text and "&lt;b&gt;" in text


def test_html_names_the_folders_of_a_row(page):
    assert 'data-folders="again camera_p"' in to_html(page)


def test_a_narrow_terminal_cuts_no_cell(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    print_page(page)
    printed = capsys.readouterr().out
    assert "…" not in printed
    for text in ("Camera-P", "41.0", "Minutes", "failed: 50% & more_of"):
        assert text in printed


def test_a_screen_too_narrow_for_the_errors_shows_the_scores_without(page, capsys, monkeypatch):
    page = replace(page, tables=page.tables[:1], notes=[])
    widths = {}
    for columns in (300, None):
        monkeypatch.setenv("COLUMNS", str(columns or widths[300] - 1))
        print_page(page)
        printed = capsys.readouterr().out
        widths[columns] = max(map(len, printed.splitlines()))
        assert ("± 1.4" in printed) == (columns == 300) and "(continued)" not in printed
    assert widths[None] < widths[300]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_table_wider_than_the_terminal_is_folded_and_loses_nothing(
    columns, tmp_path, capsys, monkeypatch
):
    tasks = {task: 30.0 + n for n, task in enumerate(NINE_TASKS)}
    words = "a setting that takes a good many words to say what it is about"
    for number, method in enumerate(("dense", "naee", "camera_p")):
        for search in ("auto", words):
            name = f"{method}{len(search)}"
            add(tmp_path, name, method, 0.4 * (number > 0) or None, tasks=tasks, search=search)
    page = paper_page(read_runs(OutputFolder(tmp_path).runs()), errors="se")
    monkeypatch.setenv("COLUMNS", str(columns))
    print_page(page)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    for number in range(9):
        assert f"{30 + number}.0 ± 4." in printed
    assert printed.count("Camera-P") >= 2 * (1 + (columns < 100))
    assert "(continued)" in printed and words.split()[-1] in printed
