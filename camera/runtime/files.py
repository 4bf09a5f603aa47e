"""Durable and atomic files, what is in them, free space, content keys."""

import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from camera.runtime.errors import CameraError

T = TypeVar("T")

log = logging.getLogger("camera")
REMEMBERED = 2**28  # bytes from which on hashing a file again is worth a note of its digest
SETTLED = 2.0  # seconds: what was written later may be written again without a new time stamp


def sync(path: Path) -> None:
    """Wait until a file is on the disk, or a folder's list of names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def replace_durably(partial: Path, path: Path) -> None:
    """Rename a finished file, or folder of files, into place once its bytes are on the disk."""
    for inside in partial.rglob("*"):
        sync(inside)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def refuse_existing(path: Path) -> None:
    """CameraError if there is something where a new file or folder is to be."""
    if path.exists():
        raise CameraError(f"{path} exists already: delete it or choose another name.")


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Where a new file or folder grows; at the end it appears as `path`, or not at all.

    CameraError if there is something already, or it can't be written.
    """
    refuse_existing(path)
    partial = partial_of(path)
    _remove(partial)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        replace_durably(partial, path)
    except OSError as error:
        raise CameraError(
            f"can't write {path} ({error}): free space on that disk or choose another one."
        ) from error
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def require_space(folder: Path, needed: int) -> None:
    """Refuse if the disk of `folder` has less than `needed` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        has, needs = _told_apart(free, needed)
        raise CameraError(
            f"{folder} has {has} free and the checkpoint may need {needs}: free space or set "
            "output to another disk."
        )


def _told_apart(less: int, more: int) -> tuple[str, str]:
    """Two different sizes, in the unit of the larger and with as many digits as show it."""
    sizes = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((size for size in sizes if more >= size[0]), (1.0, "bytes"))
    texts = ([f"{n / unit:.{digits}f} {name}" for n in (less, more)] for digits in range(1, 10))
    has, needs = next(pair for pair in texts if pair[0] != pair[1])
    return has, needs


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give a file that is written inside the permissions of any new file of this user.

    safetensors writes to a private file (0600) and renames it.
    """
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(stat.S_IMODE(mode))


def write_json(path: Path, content: dict) -> None:
    """Write JSON so that the file is whole or absent, whatever happens."""
    partial = partial_of(path)
    partial.write_text(json.dumps(content, indent=2) + "\n")
    replace_durably(partial, path)


def digest_of(path: Path) -> str:
    """sha256 of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path: Path) -> str:
    """`digest_of` a file that seldom changes: a large one is read once, not once a run."""
    return remembered(path, "sha256", lambda: digest_of(path))


def remembered(path: Path, what: str, read: Callable[[], T]) -> T:
    """What `read` finds out of a large file, by the note of an earlier run if there is one.

    Notes in the user's cache (`XDG_CACHE_HOME`) hold it under the file's place, size, times and
    inode: a file that was written since has another.
    """
    about = path.stat()
    if about.st_size < REMEMBERED or time.time() - about.st_ctime < SETTLED:
        return read()
    stamp = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    note = cache / "camera" / f"{content_key({'file': str(path.resolve()), 'stamp': stamp})}.json"
    known: dict = {"file": str(path)}
    if note.exists():
        try:
            known |= json.loads(note.read_text())
        except (ValueError, TypeError):
            log.warning("%s can't be read: reading %s anew.", note, path)
    if what in known:
        return known[what]
    found = read()
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, known | {what: found})
    except OSError as error:
        log.warning("what %s holds is not kept for the next run (%s).", path, error)
    return found


def content_key(about: dict) -> str:
    """A short name for what a cached file was made from."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def partial_of(path: Path) -> Path:
    """Where a file or folder grows until it is complete."""
    return path.with_name(f".{path.name}.partial")


class CheckpointFiles:
    """Names of the files of a checkpoint beside its weights and configuration."""

    REPORT = "camera.json"
    EVALUATION = "evaluation.json"
    STATISTICS = "statistics.safetensors"
    PLAN = "plan.safetensors"
