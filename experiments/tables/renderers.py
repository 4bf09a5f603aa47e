"""How a page of tables looks: on the terminal, in Markdown, in LaTeX, in HTML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import rich.box
from jinja2 import Environment
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from experiments.tables.cells import Cell
from experiments.tables.pages import Page, Table

DIFFERS = "≠"
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}
LATEX |= {"–": "--", "−": "$-$", "+": "$+$", "±": r"$\pm$", "≠": r"$\neq$", "×": r"$\times$"}
LATEX |= {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "…": r"\ldots{}"}
LATEX |= {"Δ": r"$\Delta$", "²": r"$^2$", "†": r"$\dagger$", "α": r"$\alpha$", "√": r"$\surd$"}
HTML = """\
{%- macro shown(cell) -%}
{%- if cell.place == 1 %}<strong>{{ cell.text }}</strong>
{%- elif cell.place == 2 %}<u>{{ cell.text }}</u>{% else %}{{ cell.text }}{% endif %}
{%- if cell.error %} <small>± {{ cell.error }}</small>{% endif %}
{%- if cell.differs %} <b title="differs from what was published">≠</b>{% endif %}
{%- endmacro -%}
{% for table in page.tables %}
<table class="runs">
<caption>{{ table.title }}</caption>
<thead><tr>
{%- for column in table.columns %}<th scope="col" data-column="{{ column.name }}"
 class="{{ 'text' if column.is_text else 'number' }}">{{ column.header }}</th>{% endfor -%}
</tr></thead>
{% for group in table.groups %}
<tbody>
{% for row in group %}
<tr class="{{ 'run' if row.folders else 'published' }}"
 data-folders="{{ row.folders | join(' ') }}">
{%- for cell in row.cells %}<td
 class="{{ 'text' if table.columns[loop.index0].is_text else 'number' }}"
 data-value="{{ '' if cell.value is none else cell.value }}">{{ shown(cell) }}</td>{% endfor -%}
</tr>
{% endfor %}
</tbody>
{% endfor %}
</table>
{% endfor %}
{% if page.notes %}
<ul class="notes">
{% for note in page.notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
"""


def to_markdown(page: Page) -> str:
    """GitHub tables, numbers to the right."""
    parts = [f"**{table.title}**\n\n{_markdown(table)}" for table in page.tables]
    notes = "".join(f"- {_escaped(note)}\n" for note in page.notes)
    return "\n".join([*parts, notes] if notes else parts)


def to_latex(page: Page) -> str:
    """booktabs tables, with what is said about them in comments; needs \\usepackage{booktabs}."""
    parts = [f"% {_one_line(table.title)}\n{_latex(table)}" for table in page.tables]
    notes = "".join(f"% {_one_line(note)}\n" for note in page.notes)
    return "\n".join([*parts, notes] if notes else parts)


def to_html(page: Page) -> str:
    """Tables as an HTML fragment without style.

    A `<tbody>` per group, a `<td data-value>` with the unrounded value per cell, classes `text` and
    `number`, and on each row its run folders in `data-folders`, empty for published scores (class
    `published`). The notes are a list of class `notes`.
    """
    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(HTML).render(page=page)


def print_page(page: Page) -> None:
    """Print it, without the errors behind the scores where only then a table fits the terminal.

    No cell is ever cut: a terminal that is narrower still breaks lines.
    """
    terminal = Console()
    for table in page.tables:
        grid = _grid(table)
        if terminal.is_terminal and _width(terminal, grid) > terminal.width:
            grid = _grid(_without_errors(table))
        Console(width=max(terminal.width, _width(terminal, grid))).print(grid)
        terminal.print()
    for note in page.notes:
        terminal.print(Text(note), style="dim")


def _width(console: Console, grid: Grid) -> int:
    return console.measure(grid, options=console.options.update(width=10_000)).maximum


def _without_errors(table: Table) -> Table:
    groups = [
        [replace(row, cells=[replace(cell, error="") for cell in row.cells]) for row in group]
        for group in table.groups
    ]
    return replace(table, groups=groups)


def _groups(table: Table) -> Iterator[list[list[Cell]]]:
    """The cells by group and row, the ratio only where a group begins."""
    for first, *others in table.groups:
        yield [first.cells, *([Cell(""), *row.cells[1:]] for row in others)]


def _markdown(table: Table) -> str:
    dashes = ["---" if column.is_text else "---:" for column in table.columns]
    lines = [[_escaped(column.header) for column in table.columns], dashes]
    lines += [[_markdown_cell(cell) for cell in row] for group in _groups(table) for row in group]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    text = {1: f"**{text}**", 2: f"<ins>{text}</ins>"}.get(cell.place, text)
    return text + _behind(cell)


def _escaped(text: str) -> str:
    return _one_line(text).replace("|", "\\|").replace("<", "&lt;")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _behind(cell: Cell) -> str:
    return (f" ± {cell.error}" if cell.error else "") + (f" {DIFFERS}" if cell.differs else "")


def _latex(table: Table) -> str:
    sides = "".join("l" if column.is_text else "r" for column in table.columns)
    headers = " & ".join(_latex_text(column.header) for column in table.columns)
    groups = [
        "".join(f"{' & '.join(map(_latex_cell, row))} \\\\\n" for row in group)
        for group in _groups(table)
    ]
    return (
        f"\\begin{{tabular}}{{{sides}}}\n\\toprule\n{headers} \\\\\n\\midrule\n"
        + "\\midrule\n".join(groups)
        + "\\bottomrule\n\\end{tabular}\n"
    )


def _latex_cell(cell: Cell) -> str:
    text = _latex_text(cell.text)
    text = {1: f"\\textbf{{{text}}}", 2: f"\\underline{{{text}}}"}.get(cell.place, text)
    error = rf" {{\scriptsize$\pm${cell.error}}}" if cell.error else ""
    return text + error + (r" $\neq$" if cell.differs else "")


def _latex_text(text: str) -> str:
    # pdflatex stops at a letter that its fonts lack, and knows those of Latin scripts.
    known = (LATEX.get(c, c if c < "ƀ" else "?") for c in _one_line(text))
    return "".join(known)


def _grid(table: Table) -> Grid:
    grid = Grid(
        title=Text(table.title),
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1),
        header_style="bold",
    )
    for column in table.columns:
        justify = "left" if column.is_text else "right"
        grid.add_column(Text(column.header), justify=justify, no_wrap=True)
    for group in _groups(table):
        for row in group:
            grid.add_row(*map(_terminal_cell, row))
        grid.add_section()
    return grid


def _terminal_cell(cell: Cell) -> Text:
    text = Text(cell.text, style={1: "bold", 2: "underline"}.get(cell.place, ""))
    return Text.assemble(text, _behind(cell))
