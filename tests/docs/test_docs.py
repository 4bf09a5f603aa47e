"""What README.md and the pages of docs/ say is so: commands, settings, presets, links, messages."""

import argparse
import ast
import functools
import importlib
import math
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments.config.location import CONF
from experiments.config.settings import Settings
from tests.helpers.runs.composing import choices, config_of
from tests.helpers.runs.documents import (
    PAGES,
    README,
    ROOT,
    blocks,
    reference_settings,
    spans,
    text_of,
    without_blocks,
)

EXAMPLES = ROOT / "examples" / "README.md"
TEXTS = {name: text_of(path) for name, path in PAGES.items()}
# these name settings without their group
MEASURED = ("differences.md", "performance.md", "results.md", *(n for n in PAGES if "/" in n))
PLACEHOLDERS = {"NAME": "roofline"}  # of a benchmark; others will do as they stand
WORDS = ("camera", "eval", "git", "make", "pip", "source", "wandb")
ELLIPSIS = "…"


class ParsedError(Exception):
    """The arguments of a command were understood; it goes no further."""


def commands() -> list[str]:
    """Every command of README and docs, as one line each."""
    lines: list[str] = []
    for text in map(text_of, (README, *PAGES.values())):
        code = blocks(text, "console", "bash")
        code += re.findall(r"^    ((?:python|torchrun) .*)$", text, re.MULTILINE)
        code += [
            span for span in spans(text) if re.match(r"(python (main\.py|-m)|torchrun) ", span)
        ]
        for block in code:
            lines += [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    words = [shlex.split(line, comments=True) for line in lines]
    return sorted({shlex.join(line) for line in words if line})


def runs() -> list[str]:
    """What is said to main.py: every choice alone, a method's own settings beside the method."""
    told = [line for line in commands() if not line.startswith("eval ")]  # of the shell itself
    lines = [line.replace("...", "").partition("main.py")[2] for line in told]
    parser = OverridesParser.create()
    found = []
    for words in filter(None, map(shlex.split, lines)):
        own = []
        for override in parser.parse_overrides([word for word in words if word[0] != "-"]):
            values = override.sweep_string_iterator() if override.is_sweep_override() else None
            choices = [
                f"{override.key_or_group}={value}"
                for value in values or [override.get_value_element_as_str()]
            ]
            if override.key_or_group.startswith("method."):
                own += choices[:1]
            else:
                found += choices
        if own:
            found.append(" ".join([*(word for word in words if word.startswith("method=")), *own]))
    return found


def modules() -> list[str]:
    """What is said to a module: `python -m`, and the subcommands that are the library's own."""
    told = [line for line in commands() if re.match(r"python -m |camera (export|describe) ", line)]
    return [line.removeprefix("python -m ") for line in told]


def settings_told() -> list[str]:
    """`key=value` in running text, several together where they stand so."""
    text = "\n".join(text for name, text in TEXTS.items() if name not in MEASURED)
    return [span for span in spans(text) if re.fullmatch(r"([\w./]+=[\w./-]+ ?)+", span)]


def test_commands_are_found_and_of_a_kind_tested_here():
    known = ("python", "torchrun", "srun", *WORDS)
    assert len(set(runs())) > 40 and len(modules()) > 10 and len(set(settings_told())) > 20
    assert not [line for line in commands() if line.split()[0] not in known]


def test_every_setting_composes():
    batches: list[dict[str, str]] = []  # composing takes long: as many at once as don't collide
    for together in sorted({*runs(), *settings_told()}):
        slots = {}
        for setting in together.split():
            key, group = re.match(r"([^=.]+)[^=]*", setting).group(0, 1)
            # one method, or tracker, doesn't know another's settings
            slot = group if group in ("method", "tracker") else key
            slots[slot] = f"{slots[slot]} {setting}" if slot in slots else setting
        if any(slot.startswith("hydra") for slot in slots):
            continue
        batch = next((known for known in batches if not known.keys() & slots.keys()), None)
        if batch is None:
            batches.append(batch := {})
        batch.update(slots)
    for batch in batches:
        assert Settings.of(config_of(*" ".join(batch.values()).split())).method_name


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("line", modules())
def test_a_module_takes_these_arguments(line, monkeypatch):
    name, *arguments = [PLACEHOLDERS.get(text, text) for text in shlex.split(line)]
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, given=None, namespace=None):
        parse(self, given, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises((ParsedError, SystemExit)) as end:
        runpy.run_module(name, run_name="__main__")
    assert end.type is ParsedError or end.value.code == 0


def test_launchers_are_there_and_know_the_keys_that_are_told():
    files = {file.stem: file for file in (CONF / "hydra" / "launcher").glob("*.yaml")}
    known = {"n_jobs"}.union(*map(OmegaConf.load, files.values()))
    text = "\n".join(TEXTS.values())
    keys = set(re.findall(r"hydra\.launcher\.(\w+)", text))
    assert len(keys) >= 5 and keys <= known
    assert set(re.findall(r"hydra/launcher=(\w+)", text)) == set(files)


def sweep_of(preset: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """A preset's params and grids, with those of the presets that it adds up."""
    said = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{preset}.yaml"))
    own = said.get("hydra", {}).get("sweeper", {})
    parts = [sweep_of(name) for name in said.get("defaults", [])]
    params, grids = ({k: v for part in parts for k, v in part[i].items()} for i in (0, 1))
    return params | own.get("params", {}), grids | own.get("grids", {})


def test_presets_are_all_told_with_the_number_of_their_runs():
    table = TEXTS["reproducing.md"].partition("<!-- presets -->")[2]
    told = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", table, re.MULTILINE))
    assert set(told) == set(choices("experiment"))
    for name, number in told.items():
        params, grids = sweep_of(name)
        products = [params | product for grid in grids.values() for product in grid]
        sizes = [[len(v) for v in each.values() if isinstance(v, list)] for each in products]
        assert sum(map(math.prod, sizes)) == int(number), name


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text_of(page)), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", [README, EXAMPLES, *PAGES.values()], ids=str)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text_of(page))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index():
    index = TEXTS["README.md"]
    assert not [name for name in PAGES if name != "README.md" and f"({name})" not in index]


@functools.cache
def texts_of_the_code() -> list[list[str]]:
    """Every string of the code, split where it varies."""
    packages = ("camera", "baselines", "experiments", "hydra_plugins")
    trees = [ast.parse(text_of(file)) for name in packages for file in (ROOT / name).rglob("*.py")]
    strings = (ast.JoinedStr, ast.Constant, ast.BinOp)
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, strings)]
    return [re.split(r"\0|%[sd]", literal(node)) for node in nodes]


def literal(node: ast.expr) -> str:
    """The fixed parts of a string, NUL for what varies."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "\0"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(literal, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + literal(node.right)
    return "\0"


def quoted() -> list[str]:
    """The messages that troubleshooting.md explains: code that a row begins with."""
    rows = re.findall(
        r"^\| (`+)(.+?)\1(?: \([^|]*\))? \|", TEXTS["troubleshooting.md"], re.MULTILINE
    )
    return [message for _, message in rows]


def test_messages_are_quoted():
    assert len(quoted()) > 30


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_code(message):
    least = len(message.replace(ELLIPSIS, "")) / 2  # fixed: "{key}={value}" would do for many
    close = [
        parts
        for parts in texts_of_the_code()
        if len("".join(parts)) >= least and all(part in message for part in parts)
    ]
    assert any(re.fullmatch(".*".join(map(re.escape, parts)), message) for parts in close)


@pytest.mark.parametrize("method", ["naee", "reap", "heapr", "d2_moe", "gptq", "mc"])
def test_settings_of_the_references_are_settings_of_the_methods(method):
    """Their golden tests take them from the page; a name or value that is none is refused here."""
    settings = reference_settings(method)
    config = config_of(f"method={method}", *(f"method.{k}={v}" for k, v in settings.items()))
    assert {key: config.method[key] for key in settings} == settings


def test_a_method_s_paper_is_linked_wherever_the_method_is_explained():
    told = 0
    for file in sorted((CONF / "method").glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        for address in re.findall(r"https://arxiv\.org/abs/[\d.]+", text):
            module = OmegaConf.load(file)["_target_"].rpartition(".")[0]
            assert address in importlib.import_module(module).__doc__, module
            assert address in TEXTS["methods.md"] and address in text_of(README), file
            told += 1
    assert told >= 10
