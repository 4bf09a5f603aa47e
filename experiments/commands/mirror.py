"""Write the hub's texts and tasks as a folder in the offline layout.

Run it where there is internet, copy DIR to where there is none, and set `data=DIR` there. Files
that are there are kept, so an interrupted mirror is finished by running it again.
"""

import argparse
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from camera.calibration.corpora import CORPORA, hub_errors
from camera.evaluation.tasks.definitions import hub_address
from camera.evaluation.tasks.names import NINE_TASKS
from camera.runtime.errors import CameraError
from experiments.records.mirrored import mark


def mirror(
    folder: str | Path,
    *,
    c4_documents: int | None = None,
    tasks: Sequence[str] = NINE_TASKS,
    force: bool = False,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Write every corpus and task under `folder` and return the files written.

    `c4_documents` keeps only the first documents of each C4 shard (None: all, about 360 MB, which
    published C4 perplexities need). Files that exist are kept unless `force`. Each file appears
    whole or not at all. mirror.json notes their digests: tables name the data sets by it.

    Raises CameraError for an unknown task, a folder that can't be written and a dataset that can't
    be loaded.
    """
    folder = Path(folder).expanduser()
    if c4_documents is not None and c4_documents < 1:
        raise CameraError(
            f"--c4-documents {c4_documents}: give at least 1, or leave it out for all"
        )
    jobs = [
        (folder / file, corpus.hub[split], c4_documents if name == "c4" else None)
        for name, corpus in CORPORA.items()
        for split, file in corpus.files.items()
    ]
    jobs += [(folder / f"tasks/{task}.jsonl.gz", hub_address(task), None) for task in tasks]
    written = []
    for path, address, limit in jobs:
        if path.exists() and not force:
            report(f"kept     {path}")
            continue
        rows = download(address, limit)
        count = _write_lines(path, rows) if path.suffix == ".txt" else _write_jsonl(path, rows)
        report(f"written  {path} ({count} rows of {address['path']})")
        mark(folder, path)
        written.append(path)
    return written


def download(address: Mapping[str, Any], limit: int | None) -> Iterable[Mapping[str, Any]]:
    """Rows of a data set of the hub, the first `limit` of them; CameraError if it can't be had."""
    with hub_errors(address["path"]):
        import datasets

        dataset = datasets.load_dataset(**address)
        return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    lines = (row["text"].removesuffix("\n").encode() + b"\n" for row in rows)
    with _whole(path) as file:
        return _write(file, lines)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    lines = (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    # No file name and no time in the header: the same rows give the same bytes.
    with _whole(path) as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        return _write(packed, lines)


def _write(file: IO[bytes], lines: Iterable[bytes]) -> int:
    count = 0
    for line in lines:
        file.write(line)
        count += 1
    return count


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only once it is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CameraError(
            f"{path.parent}: can't be written ({error}); choose another folder"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="camera mirror", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="where to write; give it later as data=DIR")
    parser.add_argument(
        "--c4-documents", type=int, metavar="N", help="only the first N documents of each C4 shard"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=NINE_TASKS,
        metavar="TASK",
        help="lm-eval tasks; default: the nine",
    )
    parser.add_argument("--force", action="store_true", help="write again what is there")
    chosen = parser.parse_args(arguments)
    try:
        mirror(
            chosen.folder, c4_documents=chosen.c4_documents, tasks=chosen.tasks, force=chosen.force
        )
    except CameraError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
