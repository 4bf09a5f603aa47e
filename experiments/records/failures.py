"""Failures of runs: their one line, and those that have a sentence of their own."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from camera.runtime.errors import CameraError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


class FailedBeforeError(CameraError):
    """A run of a sweep that failed the last time, and isn't tried again unless asked for."""


class DamagedFileError(CameraError):
    """A file of this project's own that holds no JSON: a power cut or a copy left it so."""

    def __init__(self, path: Path):
        super().__init__(f"{path} is damaged, it holds no JSON: delete it and start again.")
        self.path = path


class NoRunsError(CameraError):
    """A folder of runs that was named and holds none."""

    def __init__(self, folder: Path, wanted: str = "the folder that was `output`"):
        where = "" if folder.is_dir() else " (there is no such folder)"
        super().__init__(f"{folder} has no runs{where}: give {wanted}.")


def one_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, CameraError) else f"{type(error).__name__}: {text}".rstrip(": ")
    )


@contextmanager
def naming_output(output: Path) -> Iterator[None]:
    """Turn what the disk refuses below `output` into a CameraError that names it."""
    try:
        yield
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else None
        if error.errno in FULL:
            mend = "free space on that disk, or set output to another."
        elif place is not None and _on_the_way(place, output) and _is_refused(error, output):
            mend = "set output to a folder that can be written."
        else:
            raise
        raise CameraError(
            f"output={output}: {place or 'a file'} can't be written ({error.strerror}): {mend}"
        ) from error


def _is_refused(error: OSError, output: Path) -> bool:
    """Whether the place can't be written; a missing one only where no folder can be made."""
    missing = error.errno == errno.ENOENT and not output.exists()
    return missing or error.errno in FORBIDDEN


def _on_the_way(place: Path, output: Path) -> bool:
    """Whether a file lies below the output, or the output below it."""
    place, output = place.absolute(), output.absolute()
    return place.is_relative_to(output) or output.is_relative_to(place)
