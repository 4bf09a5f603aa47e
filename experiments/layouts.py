"""How a table of runs looks: on the terminal, in Markdown, in LaTeX."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

HEADERS = {
    "model": "Model",
    "method": "Method",
    "settings": "Settings",
    "sparsity": "Sparsity",
    "sparsity_of": "of",
    "sparsity_moe": "MoE",
    "sparsity_model": "Whole",
    "sparsity_routed": "Routed",
    "bits": "Bits",
    "bits_raw": "Raw",
    "bits_stored": "Stored",
    "bits_model": "Bits of all",
    "wikitext2": "Wiki2",
    "c4": "C4",
    "boolq": "BoolQ",
    "openbookqa": "OBQA",
    "rte": "RTE",
    "arc_easy": "ARC-e",
    "winogrande": "WinoG",
    "hellaswag": "HellaS",
    "arc_challenge": "ARC-c",
    "piqa": "PIQA",
    "mathqa": "MathQA",
    "average": "Avg",
    "size_mb": "MB",
    "minutes": "Minutes",
    "peak_gb": "Peak GB",
    "prefill_x": "Prefill ×",
    "decode_x": "Decode ×",
    "status": "Status",
}
TEXTS = ("model", "method", "settings", "sparsity_of", "status")
DIGITS = {"sparsity": 3, "wikitext2": 2, "c4": 2, "peak_gb": 2}
DIGITS |= {
    "prefill_x": 2,
    "decode_x": 2,
    "bits": 2,
    "bits_raw": 2,
    "bits_stored": 2,
    "bits_model": 2,
}
UNTOLD = ("folder", "_identity")
NAMES = ("Model", "Method", "Settings", "Sparsity", "Bits")
COSTS = ("of", "MoE", "Whole", "Routed", "Raw", "Stored", "Bits of all")
COSTS += ("MB", "Minutes", "Peak GB", "Status")


def paper_layout(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs as text: columns that say nothing left out, numbers rounded, headers short."""
    page = pd.DataFrame(index=runs.index)
    for column in runs.columns:
        if column not in UNTOLD and _says_something(column, runs[column]):
            page[HEADERS.get(column, column)] = [_cell(column, value) for value in runs[column]]
    return page


def to_markdown(page: pd.DataFrame) -> str:
    """A GitHub table, numbers to the right."""
    rows = [list(page.columns), [_dashes(header) for header in page.columns]]
    rows += [[_markdown(cell) for cell in row] for row in page.itertuples(index=False, name=None)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def to_latex(page: pd.DataFrame) -> str:
    """A booktabs table; needs \\usepackage{booktabs}."""
    columns = "".join("l" if _is_text(header) else "r" for header in page.columns)
    return (
        page.map(_latex)
        .rename(columns=_latex)
        .to_latex(index=False, escape=False, column_format=columns)
    )


def print_table(page: pd.DataFrame) -> None:
    """Print it; where it is wider than the terminal, in two: what was removed, and the scores."""
    terminal = Console()
    whole = _rich(page)
    if _width(terminal, whole) <= terminal.width:
        terminal.print(whole)
        return
    named = [header for header in NAMES if header in page]
    costs = [header for header in COSTS if header in page]
    scores = [header for header in page if header not in (*named, *costs)]
    for headers in filter(None, (costs, scores)):
        part = _rich(page[[*named, *headers]])
        # A terminal that is narrower still breaks lines; cells would be cut.
        Console(width=max(terminal.width, _width(terminal, part))).print(part)
        terminal.print()


def _width(console: Console, table: Table) -> int:
    unlimited = console.options.update(width=10_000)
    return console.measure(table, options=unlimited).maximum


def _rich(page: pd.DataFrame) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for header in page.columns:
        justify = "left" if _is_text(header) else "right"
        table.add_column(header, justify=justify, no_wrap=True)
    for row in page.itertuples(index=False, name=None):
        table.add_row(*row)
    return table


def _says_something(column: str, values: pd.Series) -> bool:
    if column == "status":
        return bool((values != "done").any())
    if column in ("settings", "model", "sparsity_of"):
        return column == "model" or bool(values.fillna("").astype(str).str.len().any())
    return bool(values.notna().any())


def _cell(column: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "–"
    if isinstance(value, str):
        return value
    digits = DIGITS.get(column, 1)
    if column == "sparsity":
        return f"{value:.{digits}g}%"
    if column.startswith("sparsity_"):
        return f"{value:.{digits}f}%"
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.1e}"


def _is_text(header: str) -> bool:
    return header in {HEADERS[column] for column in TEXTS}


def _dashes(header: str) -> str:
    return "---" if _is_text(header) else "---:"


def _markdown(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special["–"] = "--"
    return "".join(special.get(character, character) for character in text)
