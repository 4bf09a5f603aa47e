"""Subcommands of `python -m camera` that need no Hydra: exports, and what a model is made of."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from camera.pipeline.time.cards import CARD, CARDS
from camera.runtime.errors import CameraError


def main(arguments: Sequence[str] | None = None, program: str = "python -m camera") -> int:
    """Carry out a subcommand; its exit code."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("export", help="write what other programs read")
    command.add_argument("checkpoint", help="folder of a compressed checkpoint")
    command.add_argument("out", help="folder, or file ending in .gguf, to write; must not exist")
    formats = "native, gguf (default for OUT.gguf), compressed-tensors, approximate-experts"
    command.add_argument("--format", help=formats)
    command.add_argument(
        "--width-multiple", type=int, default=8, help="experts are padded to a multiple (8)"
    )
    command.add_argument("--type", help="of a GGUF's matrices: F32, F16, BF16, Q8_0")
    command.add_argument("--template", help="GGUF of the same model, whose tokenizer is taken")
    command.add_argument("--pre", help="llama.cpp's name of how the tokenizer splits text")
    command.add_argument("--trust-remote-code", action="store_true", help="run its Python code")
    command.set_defaults(carry_out=_export)
    command = commands.add_parser("describe", help="parts of a model, and what methods leave")
    command.add_argument("model", help="folder with a config.json, or an id on the hub")
    command.add_argument("--sparsity", type=float, default=0.4, help="of its experts (0.4)")
    command.add_argument("--card", default=CARD, help=f"{', '.join(CARDS)} ({CARD})")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--trust-remote-code", action="store_true", help="run its Python code")
    command.set_defaults(carry_out=_describe)
    command = commands.add_parser("imatrix", help="importance matrix for llama-quantize")
    command.add_argument("model", help="folder of a checkpoint, or its id on the hub")
    command.add_argument("out", help="file to write, which must not exist")
    command.add_argument("--source", default="wikitext2", help="wikitext2, c4, mixed, or a file")
    command.add_argument("--samples", type=int, default=128, help="windows of text (128)")
    command.add_argument("--length", type=int, default=2048, help="tokens of each (2048)")
    command.add_argument("--data", default="hub", help="hub, or a folder in the offline layout")
    command.add_argument("--seed", type=int, default=1234, help="of the windows (1234)")
    command.add_argument("--device", default="auto")
    command.add_argument("--dtype", default="auto", help="to compute in")
    command.add_argument("--trust-remote-code", action="store_true")
    command.set_defaults(carry_out=_imatrix)
    command = commands.add_parser("tensor-types", help="types by layer for llama-quantize")
    command.add_argument("checkpoint", help="folder of a quantised checkpoint")
    command.add_argument("out", help="file to write, which must not exist")
    command.add_argument("--trust-remote-code", action="store_true")
    command.set_defaults(carry_out=_tensor_types)
    asked = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("camera").setLevel(logging.INFO)
    try:
        asked.carry_out(asked)
    except CameraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _export(asked: argparse.Namespace) -> None:
    from camera.engines.export import export

    export(
        asked.checkpoint,
        asked.out,
        format=asked.format,
        width_multiple=asked.width_multiple,
        type=asked.type,
        template=asked.template,
        pre=asked.pre,
        trust_remote_code=asked.trust_remote_code,
    )


def _imatrix(asked: argparse.Namespace) -> None:
    from camera.calibration.settings import Calibration
    from camera.engines.gguf.imatrix import imatrix

    imatrix(
        asked.model,
        asked.out,
        calibration=Calibration(asked.source, asked.samples, asked.length),
        data=asked.data,
        seed=asked.seed,
        device=asked.device,
        dtype=asked.dtype,
        trust_remote_code=asked.trust_remote_code,
    )


def _tensor_types(asked: argparse.Namespace) -> None:
    from camera.engines.gguf.tensor_types import tensor_types

    tensor_types(asked.checkpoint, asked.out, asked.trust_remote_code)


def _describe(asked: argparse.Namespace) -> None:
    from camera.inspection import description

    found = description(asked.model, asked.sparsity, asked.trust_remote_code, asked.card)
    print(json.dumps(found.to_dict(), indent=2) if asked.json else found)


if __name__ == "__main__":
    sys.exit(main())
