"""Writes the world in the offline data layout: `python -m experiments.tiny_moe.layout DIR`."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from random import Random

from experiments.tiny_moe.corpus import article, web_page
from experiments.tiny_moe.held_out import held_out_rows
from experiments.tiny_moe.tasks import TASKS
from experiments.tiny_moe.world import SEED, World, build_world

VERSION = 2
ROWS = 500
ARTICLES = {"train": 4000, "validation": 400, "test": 800}
PAGES = {"train": 1500, "validation": 300}
TALK = 0.3  # web pages to an article: a text without the forms of the tasks tells nothing of them
SOURCES = ("world", "phrases", "items", "sums", "tasks", "held_out", "corpus", "layout")


@cache
def fingerprint() -> str:
    """Names what the layout holds: a hash of the generator's source, its seed and its version."""
    digest = hashlib.sha256(f"{SEED}/{VERSION}".encode())
    for name in SOURCES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def articles(world: World, split: str) -> list[str]:
    """The lines of one split of the encyclopaedia: articles, and a talk page after some of them."""
    rng = Random(f"articles/{split}")
    lines: list[str] = []
    for _ in range(ARTICLES[split]):
        lines += article(world, rng)
        if rng.random() < TALK:
            lines += web_page(world, rng).split("\n")
    return [line for line in lines if line]


def pages(world: World, split: str) -> list[dict]:
    """The web documents of one split: some posts and quizzes each."""
    rng = Random(f"pages/{split}")
    return [
        {"text": "\n\n".join(web_page(world, rng) for _ in range(rng.randint(2, 14)))}
        for _ in range(PAGES[split])
    ]


def tasks(world: World) -> dict[str, list[dict]]:
    """The held-out rows of every task."""
    return {name: held_out_rows(world, name, ROWS, Random(f"rows/{name}")) for name in TASKS}


def _write_text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(lines) + "\n").encode())


def _write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(text.encode())


def write_layout(folder: Path) -> None:
    """Fills a folder with the layout."""
    world = build_world()
    for split in ARTICLES:
        _write_text(folder / "wikitext2" / f"{split}.txt", articles(world, split))
    for split in PAGES:
        _write_rows(folder / "c4" / f"{split}.jsonl.gz", pages(world, split))
    for name, rows in tasks(world).items():
        _write_rows(folder / "tasks" / f"{name}.jsonl.gz", rows)


def _appear(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes a folder appear whole; if another process was first, its folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        fresh.chmod(0o755)
        write(fresh)
        fresh.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def ensure_world(folder: Path) -> Path:
    """The layout's folder inside `folder`, written if it is not there yet."""
    target = Path(folder) / f"tiny_world-{fingerprint()}"
    if not target.is_dir():
        _appear(target, write_layout)
    return target


if __name__ == "__main__":
    print(ensure_world(Path(sys.argv[1])))
