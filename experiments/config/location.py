"""Where conf/ and the embedded model are, in a checkout and in an installed wheel."""

from __future__ import annotations

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
