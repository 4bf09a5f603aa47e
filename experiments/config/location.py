"""Where conf/ and the embedded model are, in a checkout and in an installed wheel."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib.resources import files
from pathlib import Path

EMBEDDED = "embedded"  # the name of the model, and of its texts, that this package ships

_PACKAGE = Path(str(files("experiments")))
_INSTALLED = _PACKAGE / "conf"  # a wheel carries conf/ as `experiments.conf`

CONF = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "conf"
EMBEDDED_MODEL = _PACKAGE / "tiny_moe" / "model"


def user_path(path: str) -> str:
    """The path with the home folder that `~` stands for; what isn't a path stays as it is."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def user_folder(path: str) -> Path:
    """A folder that a command is given."""
    return Path(user_path(path))


def add_output_folder(
    parser: ArgumentParser, about: str = "what was `output`", metavar: str = "DIR"
) -> None:
    """The argument `folder` of a command that reads an output folder: outputs, unless given."""
    parser.add_argument(
        "folder",
        type=user_folder,
        metavar=metavar,
        nargs="?",
        default=user_folder("outputs"),
        help=f"{about} (default: outputs)",
    )
