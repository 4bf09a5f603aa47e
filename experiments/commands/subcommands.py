"""The console script `camera`: one command for what the project does.

    camera run method=camera_p sparsity=0.2       one run, with Hydra's overrides
    camera sweep method=camera_p sparsity=0.2,0.4 a sweep, ending in a table
    camera evaluate outputs/checkpoints/NAME      perplexity and tasks of any model
    camera tables outputs                         the table of what has run

Modules are loaded by the subcommand that needs them, so that help comes at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
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
    try:
        code = _carried_out(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; at exit Python would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _carried_out(arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
        return 0
    if name not in SUBCOMMANDS:
        near = get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        print(f"camera {name} is no command{hint}\n\n{usage()}", file=sys.stderr)
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
    lines = [f"  {name:<14}{entry.help}" for name, entry in SUBCOMMANDS.items()]
    return "\n".join(
        ["usage: camera COMMAND ...", "", *lines, "", "camera COMMAND --help says more."]
    )


def _evaluate(program: str, arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in ("--help", "-h") or "=" in arguments[0]:
        print(EVALUATE)
        return 0 if arguments[:1] in (["--help"], ["-h"]) else 2
    model, *overrides = arguments
    return _hydra()(program, [f"model.path={model}", "method=dense", *overrides])


def _hydra(*before: str) -> Callable[[str, list[str]], int | None]:
    def call(program: str, arguments: list[str]) -> int | None:
        # Hydra and its launchers read sys.argv
        sys.argv = [program, *before, *arguments]
        return import_module("experiments.__main__").command()

    return call


def _module(name: str) -> Callable[[str, list[str]], int | None]:
    def call(program: str, arguments: list[str]) -> int | None:
        return import_module(name).main(arguments)

    return call


def _command(name: str) -> Callable[[str, list[str]], int | None]:
    return _module(f"experiments.commands.{name}")


def _library(name: str) -> Callable[[str, list[str]], int | None]:
    def call(program: str, arguments: list[str]) -> int | None:
        return import_module("camera.__main__").main([name, *arguments], program="camera")

    return call


def _completion(program: str, arguments: list[str]) -> int | None:
    return import_module("experiments.commands.completion").main(arguments, list(SUBCOMMANDS))


def _lm_eval(program: str, arguments: list[str]) -> int | None:
    sys.argv = [program, *arguments]
    import_module("camera")  # transformers then knows the format
    return import_module("lm_eval.__main__").cli_evaluate()


EVALUATE = """usage: camera evaluate MODEL [SETTING=VALUE ...]

Measures a model as it is, compressed or not, and prints and keeps the numbers as a run does.

  MODEL                 a folder (of a checkpoint, for instance) or an id on the hub
  evaluation=NAME       what is measured: quick (default), perplexity, paper, speed, none
  evaluation.KEY=VALUE  a part of it: evaluation.tasks=[boolq,piqa] evaluation.blocks=8
  data=FOLDER           where the texts and tasks are: hub, embedded, or a folder
  output=FOLDER         where the numbers go: FOLDER/runs/NAME/metrics.json (default: outputs)

camera run --help explains every setting."""

SUBCOMMANDS = {
    "run": Subcommand("one run: camera run method=camera_p sparsity=0.2", _hydra()),
    "sweep": Subcommand("several runs and their table: sparsity=0.2,0.4,0.6", _hydra("-m")),
    "evaluate": Subcommand("perplexity and tasks of a model: camera evaluate FOLDER", _evaluate),
    "status": Subcommand("how far runs and sweeps are, what failed", _command("status")),
    "tables": Subcommand("tables of an output folder", _module("experiments.tables.writing")),
    "figures": Subcommand("its figures", _module("experiments.figures.__main__")),
    "report": Subcommand("all of it on one HTML page", _module("experiments.report.__main__")),
    "describe": Subcommand("parts of a model, and what methods leave", _library("describe")),
    "export": Subcommand(
        "what other programs read: native, GGUF, compressed-tensors", _library("export")
    ),
    "imatrix": Subcommand("an importance matrix for llama-quantize", _library("imatrix")),
    "tensor-types": Subcommand("types by layer for llama-quantize", _library("tensor-types")),
    "lm-eval": Subcommand("lm-eval, on compressed checkpoints too", _lm_eval),
    "clean": Subcommand("what lies in an output folder, and freeing it", _command("clean")),
    "mirror": Subcommand("data for machines without network", _command("mirror")),
    "wandb": Subcommand("finished runs to W&B", _command("upload")),
    "bench": Subcommand("benchmarks of the library", _module("experiments.bench.__main__")),
    "completion": Subcommand("TAB for bash or zsh", _completion),
}
