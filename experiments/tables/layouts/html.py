"""A page of tables as a fragment of HTML."""

from __future__ import annotations

from jinja2 import Environment

from experiments.tables.pages import Page

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


def to_html(page: Page) -> str:
    """Tables as an HTML fragment without style.

    A `<tbody>` per group, a `<td data-value>` with the unrounded value per cell, classes `text` and
    `number`, and on each row its run folders in `data-folders`, empty for published scores (class
    `published`). The notes are a list of class `notes`.
    """
    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(HTML).render(page=page)
