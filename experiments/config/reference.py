"""Every setting with its comment in conf/: the page docs/settings.md, and the text of `--help`.

python -m experiments.config.reference docs/settings.md     writes the page
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.config.location import CONF

GROUPS = ("model", "method", "calibration", "evaluation", "tracker", "experiment", "hydra/launcher")
SHARED = "hydra/shared"
LINE = re.compile(
    r"(?P<indent> *)(?P<key>[\w./]+):(?: +(?P<value>[^#\s][^#]*?))?(?:\s+# (?P<comment>.*))?$"
)
HIDDEN = ("defaults", "hydra", "_target_", "_convert_")


@dataclass(frozen=True)
class Setting:
    """A key as it is written on the command line, its default, and what it means."""

    key: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Choice:
    """A file of a group: its name, its head comment line by line, its settings and its parts."""

    name: str
    about: tuple[str, ...]
    settings: tuple[Setting, ...]
    shared: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """What it is: the first sentence, without the link."""
        words = " ".join(line for line in self.about if line != self.link)
        return re.split(r"(?<=\.) (?=[A-Z])", words)[0]

    @property
    def link(self) -> str | None:
        """Where its head comment leads, a paper."""
        return next((line for line in self.about if line.startswith("https://")), None)


def choices(group: str) -> dict[str, Choice]:
    """The files of a group by name."""
    return {file.stem: _read(file, group) for file in sorted((CONF / group).glob("*.yaml"))}


def main_settings() -> tuple[Setting, ...]:
    """The keys of conf/config.yaml that belong to no group."""
    return _read(CONF / "config.yaml", "").settings


def settings_of(group: str, name: str) -> tuple[Setting, ...]:
    """All settings of a choice, its own before those of the files that it includes."""
    choice = _read(CONF / group / f"{name}.yaml", group)
    own = {setting.key for setting in choice.settings}
    included = (setting for part in choice.shared for setting in _part(part, group).settings)
    return (*choice.settings, *(setting for setting in included if setting.key not in own))


def _read(file: Path, group: str) -> Choice:
    lines = file.read_text(encoding="utf-8").splitlines()
    about = [line[2:] for line in _head(lines) if not line.startswith("# @package")]
    prefix = f"{group.replace('/', '.')}." if group else ""
    shared = re.findall(rf"/{SHARED}/(\w+)@_here_", "\n".join(lines))
    told = {s.key: s.meaning for part in shared for s in _part(part, group).settings}
    settings = (
        setting if setting.meaning else replace(setting, meaning=told.get(setting.key, ""))
        for setting in _settings(lines, prefix)
    )
    return Choice(file.stem, tuple(about), tuple(settings), tuple(shared))


def _part(name: str, group: str) -> Choice:
    """A file that several choices of a group include."""
    return _read(CONF / SHARED / f"{name}.yaml", group)


def _head(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("# "):
            return
        yield line


def _settings(lines: Sequence[str], prefix: str) -> Iterator[Setting]:
    """The keys with a value, by their dotted names; the comment of a parent says what it holds."""
    parents: list[tuple[int, str]] = []
    for line in lines:
        found = LINE.match(line)
        if not found:
            continue
        indent, key = len(found["indent"]), found["key"]
        parents = [parent for parent in parents if parent[0] < indent]
        path = [name for _, name in parents] + [key]
        if path[0] in HIDDEN or found["value"] is None:
            parents.append((indent, key))
        else:
            yield Setting(prefix + ".".join(path), found["value"], found["comment"] or "")


def page() -> str:
    """docs/settings.md."""
    parts = [
        "# Settings",
        "",
        "<!-- Written by python -m experiments.config.reference docs/settings.md from the comments",
        "of conf/: change them there. -->",
        "",
        "A setting and its value, `sparsity=0.4`, are arguments of `python main.py` or "
        "`camera run`. Several values, with `-m`, or to `camera sweep`, are a sweep. `--help` "
        "prints the same text.",
        "",
        *_table(main_settings()),
    ]
    for group in GROUPS:
        parts += _group_page(group)
    return "\n".join(parts) + "\n"


def _group_page(group: str) -> list[str]:
    found = choices(group)
    lines = ["", f"## `{group}=`", "", f"| {group} | |", "|---|---|"]
    for name, choice in found.items():
        lines.append(f"| `{name}` | {_cell(_about(choice))} |")
    if group == "experiment":
        return [*lines, "", "[Reproducing](reproducing.md) says what each shows and what it costs."]
    shared = dict.fromkeys(part for choice in found.values() for part in choice.shared)
    for part in shared:
        whole = _part(part, group)
        users = [name for name, choice in found.items() if part in choice.shared]
        lines += ["", f"### {whole.sentence.rstrip('.')}", ""]
        if len(users) < len(found):
            lines += [f"Of {', '.join(f'`{name}`' for name in users)}.", ""]
        lines += _table(whole.settings)
    for name, choice in found.items():
        if any(setting.meaning for setting in choice.settings):
            lines += ["", f"### `{group}={name}`", "", *_table(choice.settings)]
    return lines


def _about(choice: Choice) -> str:
    words = [f"[paper]({line})" if line == choice.link else line for line in choice.about]
    return " ".join(words)


def _table(settings: Sequence[Setting]) -> list[str]:
    rows = [
        f"| `{setting.key}` | `{setting.default}` | {_cell(setting.meaning)} |"
        for setting in settings
    ]
    return ["| setting | default | |", "|---|---|---|", *rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def help_text(
    arguments: Sequence[str] = (), program: str = "python main.py", width: int = 0
) -> str:
    """What `--help` prints: examples, the groups, the settings of the chosen method and others."""
    width = width or min(100, shutil.get_terminal_size().columns)
    sweep = "camera sweep" if program.startswith("camera") else f"{program} -m"
    program = "camera run" if program.startswith("camera") else program
    examples = {
        f"{program} method=camera_p sparsity=0.2": "one run",
        f"{sweep} method=camera_p,heapr sparsity=0.2,0.4": "a sweep, ending in a table",
        f"{program} experiment=main": "a preset",
        f"{program} --help method=heapr": "the settings of another method",
    }
    column = max(map(len, examples)) + 2
    chosen = {"method": "camera_p", "evaluation": "quick", "calibration": "wikitext2"}
    chosen |= {"tracker": "wandb", "model": "tiny_moe"}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in chosen and value in choices(key):
            chosen[key] = value
    lines = [
        f"{program} [SETTING=VALUE ...]: compress a model, measure it, put it in a table.",
        "",
        *(f"  {command:<{column}}{meaning}" for command, meaning in examples.items()),
    ]
    for group in GROUPS:
        found = choices(group).values()
        lines += ["", f"{group}=", *_columns([(c.name, c.sentence) for c in found], width)]
    blocks = {"Settings": main_settings()}
    blocks |= {f"Settings of {g}={name}": settings_of(g, name) for g, name in chosen.items()}
    for title, settings in blocks.items():
        rows = [(f"{setting.key}={setting.default}", setting.meaning) for setting in settings]
        lines += ["", title, *_columns(rows, width)]
    return "\n".join(lines)


def _columns(rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Names and meanings in two columns, a meaning below a name that is too long."""
    column = min(34, max(len(left) for left, _ in rows) + 4)
    for left, right in rows:
        wrapped = textwrap.wrap(right, width - column) or [""]
        if len(left) > column - 4:
            yield f"  {left}"
        else:
            yield f"  {left:<{column - 2}}{wrapped.pop(0)}".rstrip()
        yield from (" " * column + line for line in wrapped)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page to the file that is named, or prints it."""
    (file,) = (sys.argv[1:] if arguments is None else arguments) or ["-"]
    if file == "-":
        print(page(), end="")
    else:
        Path(file).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
