"""How a page of tables looks in Markdown and in HTML."""

from __future__ import annotations

from jinja2 import Environment

from experiments.tables.cells import Cell
from experiments.tables.pages import Page, Table

HTML = """\
{%- macro shown(cell) -%}
{%- if cell.place == 1 %}<strong>{{ cell.text }}</strong>
{%- elif cell.place == 2 %}<u>{{ cell.text }}</u>{% else %}{{ cell.text }}{% endif %}
{%- if cell.error %} <small>± {{ cell.error }}</small>{% endif %}
{%- if cell.remark %} <small>{{ cell.remark }}</small>{% endif %}
{%- if cell.differs %} <b title="differs from what was published">≠</b>{% endif %}
{%- endmacro -%}
{% for table in page.tables %}
<table class="runs" data-study="{{ table.study }}">
<caption><strong>{{ table.title }}</strong>
{%- if table.caption %} {{ table.caption }}{% endif %}</caption>
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
    """GitHub tables, numbers to the right, each below its title and caption."""
    parts = [f"{_markdown_title(table)}\n\n{_markdown(table)}" for table in page.tables]
    notes = "".join(f"- {_escaped(note)}\n" for note in page.notes)
    return "\n".join([*parts, notes] if notes else parts)


def to_html(page: Page) -> str:
    """Tables as an HTML fragment without style.

    A `<tbody>` per group, a `<td data-value>` with the unrounded value per cell, classes `text` and
    `number`, and on each row its run folders in `data-folders`, empty for published scores (class
    `published`). The notes are a list of class `notes`.
    """
    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(HTML).render(page=page)


def _markdown_title(table: Table) -> str:
    caption = f"\n\n{_escaped(table.caption)}" if table.caption else ""
    return f"**{_escaped(table.title)}**{caption}"


def _markdown(table: Table) -> str:
    dashes = ["---" if column.is_text else "---:" for column in table.columns]
    lines = [[_escaped(column.header) for column in table.columns], dashes]
    lines += [[_markdown_cell(cell) for cell in row] for group in table.shown() for row in group]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    text = {1: f"**{text}**", 2: f"<ins>{text}</ins>"}.get(cell.place, text)
    return text + cell.behind


def _escaped(text: str) -> str:
    return _one_line(text).replace("|", "\\|").replace("<", "&lt;")


def _one_line(text: str) -> str:
    return " ".join(text.split())
