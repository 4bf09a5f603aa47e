"""`python -m camera export FROM TO` and `python -m camera describe MODEL`: what needs no Hydra."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from camera.runtime.errors import CameraError


def main(arguments: Sequence[str] | None = None, program: str = "python -m camera") -> int:
    """Carry out a subcommand; its exit code."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("export", help="write a native checkpoint of uniform width")
    command.add_argument("checkpoint", help="folder of a compressed checkpoint")
    command.add_argument("out", help="folder to write; must not exist")
    command.add_argument("--width-multiple", type=int, default=8)
    command.set_defaults(carry_out=_export)
    command = commands.add_parser("describe", help="parameters and bytes of a model, as JSON")
    command.add_argument("model", help="folder of a checkpoint, or its id on the hub")
    command.add_argument("--trust-remote-code", action="store_true")
    command.set_defaults(carry_out=_describe)
    asked = parser.parse_args(arguments)
    try:
        asked.carry_out(asked)
    except CameraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _export(asked: argparse.Namespace) -> None:
    from camera.checkpoint.native import export

    export(asked.checkpoint, asked.out, asked.width_multiple)
    print(f"{asked.out}: native, uniform width")


def _describe(asked: argparse.Namespace) -> None:
    from camera.api import describe

    print(json.dumps(asdict(describe(asked.model, asked.trust_remote_code)), indent=2))


if __name__ == "__main__":
    sys.exit(main())
