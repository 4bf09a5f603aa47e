"""Which files of a data folder came from the hub: mirror.json has their digests, by their place."""

import json
from pathlib import Path

from camera.calibration.corpora import CORPORA
from camera.runtime.files import digest_of, known_digest, write_json

MARKER = "mirror.json"


def mark(folder: Path, path: Path) -> None:
    """Note that a file below the folder is as the hub has it."""
    known = _marked(folder)
    write_json(folder / MARKER, known | {str(path.relative_to(folder)): digest_of(path)})


def is_mirror(folder: Path) -> bool:
    """Whether all texts and tasks of a folder are as the hub has them: the public data sets."""
    known = _marked(folder)
    places = [folder / file for corpus in CORPORA.values() for file in corpus.files.values()]
    places += sorted(folder.glob("tasks/*"))
    found = {str(path.relative_to(folder)): path for path in places if path.is_file()}
    return bool(found) and all(known.get(n) == known_digest(p) for n, p in found.items())


def _marked(folder: Path) -> dict[str, str]:
    file = folder / MARKER
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        return {}
