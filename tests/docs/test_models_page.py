"""docs/models.md lists every family of the installed transformers that has experts, once."""

import re
from pathlib import Path

import transformers

from camera.moe.families import FAMILIES
from tests.helpers.newer_families import NESTED, NEWER, REPRESENTATIVES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"


def rows(title: str) -> dict[str, str]:
    """{model type: its row} of the table under a title."""
    part = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = {row[1]: row[2] for row in re.finditer(r"^\| `(\w+)` \|([^\n]*)$", part, re.M)}
    del found["model_type"]  # the head
    return found


def folders_with_experts() -> set[str]:
    """Models of transformers whose code defines a module of experts."""
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        if re.search(r"^class \w*Experts\(", file.read_text(encoding="utf-8"), re.M):
            found.add(file.parent.name)
    return found


def test_every_declared_family_has_a_row_that_says_how_it_is_tested():
    told = rows("Supported")
    assert set(told) == set(FAMILIES)
    for family in NEWER:
        full = family in REPRESENTATIVES.values()
        assert ("every kind of method" if full else "short list") in told[family]
    assert {name for name, row in told.items() if "in full" in row} == (
        set(FAMILIES) - set(NEWER) - set(NESTED)
    )
    assert all("text and images" in told[family] for family in NESTED)


def test_the_readme_counts_the_families():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Models: {len(FAMILIES)} types" in text


def test_every_family_of_transformers_with_experts_is_in_one_table():
    supported, refused = set(rows("Supported")), set(rows("Not supported"))
    assert not supported & refused
    covered = supported | refused | {name.removesuffix("_text") for name in supported}
    assert folders_with_experts() <= covered
    assert all(reason.strip(" |") for reason in rows("Not supported").values())
