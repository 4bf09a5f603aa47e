"""The console script `camera`: one command for what the project does.

    camera run method=camera_p sparsity=0.2       one run, with Hydra's overrides
    camera sweep method=camera_p sparsity=0.2,0.4 a sweep, ending in a table
    camera tables outputs                         the table of what has run

Modules are loaded by the subcommand that needs them, so that help comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from camera.runtime.errors import CameraError

EXTRAS = {  # a package that the library does without: the extra that brings it
    "hydra": "experiments",
    "omegaconf": "experiments",
    "pandas": "experiments",
    "matplotlib": "experiments",
    "jinja2": "experiments",
    "wandb": "experiments",
    "lm_eval": "eval",
}


@dataclass(frozen=True)
class Subcommand:
    """A subcommand: one line of help, and how its arguments are carried out."""

    help: str
    call: Callable[[str, list[str]], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a subcommand; its exit code, 2 for a name that isn't one."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
        return 0
    if name not in SUBCOMMANDS:
        print(f"camera {name} is none of {', '.join(SUBCOMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return SUBCOMMANDS[name].call(f"camera {name}", rest) or 0
    except CameraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(
            f"camera {name} needs the package {error.name}: pip install 'camera-moe[{extra}]'.",
            file=sys.stderr,
        )
        return 1


def usage() -> str:
    """Every subcommand with its line of help."""
    lines = [f"  {name:<10}{entry.help}" for name, entry in SUBCOMMANDS.items()]
    return "\n".join(
        ["usage: camera COMMAND ...", "", *lines, "", "camera COMMAND --help says more."]
    )


def _hydra(*before: str) -> Callable[[str, list[str]], int | None]:
    def call(program: str, arguments: list[str]) -> int | None:
        # Hydra and its launchers read sys.argv
        sys.argv = [program, *before, *arguments]
        return import_module("experiments.__main__").command()

    return call


def _module(name: str, *before: str) -> Callable[[str, list[str]], int | None]:
    def call(program: str, arguments: list[str]) -> int | None:
        return import_module(name).main([*before, *arguments])

    return call


def _lm_eval(program: str, arguments: list[str]) -> int | None:
    sys.argv = [program, *arguments]
    import_module("camera")  # transformers then knows the format
    return import_module("lm_eval.__main__").cli_evaluate()


SUBCOMMANDS = {
    "run": Subcommand("one run: camera run method=camera_p sparsity=0.2", _hydra()),
    "sweep": Subcommand("several runs and their table: sparsity=0.2,0.4,0.6", _hydra("-m")),
    "status": Subcommand("how far a sweep is, what failed", _module("experiments.status")),
    "tables": Subcommand("tables of an output folder", _module("experiments.tables.writing")),
    "figures": Subcommand("its figures", _module("experiments.figures.__main__")),
    "report": Subcommand("all of it on one HTML page", _module("experiments.report.__main__")),
    "describe": Subcommand("what a model is made of", _module("camera.__main__", "describe")),
    "export": Subcommand("a native checkpoint", _module("camera.__main__", "export")),
    "lm-eval": Subcommand("lm-eval, on compressed checkpoints too", _lm_eval),
    "mirror": Subcommand("data for machines without network", _module("experiments.mirror")),
    "wandb": Subcommand("finished runs to W&B", _module("experiments.upload")),
    "bench": Subcommand("benchmarks of the library", _module("experiments.bench.__main__")),
}
