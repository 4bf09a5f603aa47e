r"""Tables as LaTeX: a float each, with caption and label, for \usepackage{booktabs,graphicx}."""

from __future__ import annotations

from experiments.tables.layouts.cells import DIFFERS, Cell
from experiments.tables.pages import Page, Table

WIDE = 90  # characters of the longest line, beyond which a table is scaled down to the page
CHARACTERS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
CHARACTERS |= {character: f"\\{character}" for character in "&%$#_{}"}
CHARACTERS |= {"–": "--", "−": "$-$", "+": "$+$", "±": r"$\pm$", "≠": r"$\neq$", "×": r"$\times$"}
CHARACTERS |= {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "…": r"\ldots{}", "Δ": r"$\Delta$"}
CHARACTERS |= {"²": r"$^2$", "†": r"$\dagger$", "α": r"$\alpha$", "√": r"$\surd$"}
CHARACTERS |= {"Σ": r"$\Sigma$"}


def to_latex(page: Page) -> str:
    """A `table*` for each table, and in comments what is said of the page."""
    head = "% needs \\usepackage{booktabs,graphicx}\n"
    parts = [_float(table) for table in page.tables]
    notes = "".join(f"% {' '.join(note.split())}\n" for note in page.notes)
    return "\n".join([head, *parts, notes] if notes else [head, *parts])


def _float(table: Table) -> str:
    said = [f"{table.title}.", table.caption, *table.notes]
    caption = _text(" ".join(filter(None, said)))
    body = _tabular(table)
    if _longest_line(table) > WIDE:
        body = f"\\resizebox{{\\textwidth}}{{!}}{{%\n{body}}}\n"
    return (
        "\\begin{table*}[t]\n\\centering\n\\small\n"
        f"\\caption{{{caption}}}\n\\label{{{table.label}}}\n{body}\\end{{table*}}\n"
    )


def _tabular(table: Table) -> str:
    sides = "".join("l" if column.is_text else "r" for column in table.columns)
    headers = " & ".join(_text(column.header) for column in table.columns)
    groups = [
        "".join(f"{' & '.join(map(_cell, row))} \\\\\n" for row in group) for group in table.shown()
    ]
    return (
        f"\\begin{{tabular}}{{{sides}}}\n\\toprule\n{headers} \\\\\n\\midrule\n"
        + "\\midrule\n".join(groups)
        + "\\bottomrule\n\\end{tabular}\n"
    )


def _longest_line(table: Table) -> int:
    rows = [row.cells for group in table.groups for row in group]
    down = zip(*rows, strict=True)
    cells = [max(len(c.text + c.behind) for c in column) for column in down]
    headers = [len(column.header) for column in table.columns]
    return sum(max(sizes) + 2 for sizes in zip(cells, headers, strict=True))


def _cell(cell: Cell) -> str:
    text = _text(cell.text)
    text = {1: f"\\textbf{{{text}}}", 2: f"\\underline{{{text}}}"}.get(cell.place, text)
    error = rf" {{\scriptsize$\pm${cell.error}}}" if cell.error else ""
    remark = rf" {{\scriptsize {_text(cell.remark)}}}" if cell.remark else ""
    return text + error + remark + (f" {_text(DIFFERS)}" if cell.differs else "")


def _text(text: str) -> str:
    # pdflatex stops at a letter that its fonts lack, and knows those of Latin scripts.
    known = (CHARACTERS.get(c, c if c < "ƀ" else "?") for c in " ".join(text.split()))
    return "".join(known)
