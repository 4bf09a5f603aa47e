"""The pages that a user reads, and the code that stands in them."""

import re
from pathlib import Path
from typing import Any

import yaml

from experiments.config.location import CONF

ROOT = CONF.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def reference_settings(method: str) -> dict[str, Any]:
    """The settings that docs/differences.md names to reproduce a method's reference."""
    _, _, table = page("differences.md").partition("## To reproduce the reference, set")
    (row,) = re.findall(rf"^\| {method} \| `([^`]+)` \|", table, re.MULTILINE)
    pairs = (pair.partition("=") for pair in row.split())
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def page(name: str) -> str:
    return text_of(PAGES[name])


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced code in one of these languages."""
    return [code for language, code in FENCED.findall(text) if language in languages]


def without_blocks(text: str) -> str:
    return FENCED.sub("", text)


def spans(text: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", without_blocks(text))
