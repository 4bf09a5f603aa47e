"""Sources of text and tasks: the Hugging Face hub, or a folder in the offline layout.

`data` is `"hub"` or a folder that holds

    wikitext2/{train,validation,test}.txt      c4/{train,validation}.jsonl.gz
    tasks/<lm-eval task>.jsonl.gz

`camera mirror DIR` writes such a folder. A corpus is an entry of `CORPORA`; any
local text or jsonl file is one too, named by its path.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camera.runtime.errors import CameraError

HUB = "hub"
MIRROR = "`camera mirror DIR`"
TEXT_SUFFIXES = (".txt", ".txt.gz", ".md")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


@dataclass(frozen=True)
class Corpus:
    """A source of text: its files in the offline layout and its address on the hub, by split.

    `separator` joins the documents into one text (the WikiText convention); None keeps them apart
    (the C4 convention). `evaluated` is the split that perplexity reads. `path` is set only for a
    local file, whose one split has any name.
    """

    separator: str | None
    evaluated: str
    files: Mapping[str, str] = field(default_factory=dict)
    hub: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    path: Path | None = None


def _wikitext(split: str) -> dict[str, Any]:
    revision = "b08601e04326c79dfdd32d625aee71d232d685c3"  # a push there changes no result here
    name = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
    return {**name, "split": split, "revision": revision}


def _c4(split: str, file: str) -> dict[str, Any]:
    revision = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
    return {"path": "allenai/c4", "data_files": {split: file}, "split": split, "revision": revision}


CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus(
        separator="\n\n",
        evaluated="test",
        files={s: f"wikitext2/{s}.txt" for s in ("train", "validation", "test")},
        hub={s: _wikitext(s) for s in ("train", "validation", "test")},
    ),
    # The first shard of each split, as in GPTQ's datautils: what published C4 numbers are measured
    # on.
    "c4": Corpus(
        separator=None,
        evaluated="validation",
        files={s: f"c4/{s}.jsonl.gz" for s in ("train", "validation")},
        hub={
            "train": _c4("train", "en/c4-train.00000-of-01024.json.gz"),
            "validation": _c4("validation", "en/c4-validation.00000-of-00008.json.gz"),
        },
    ),
}


def find_corpus(name: str, *, key: str = "corpus") -> Corpus:
    """The corpus of that name in `CORPORA`, or the local text or jsonl file at that path.

    Raises CameraError, naming `key`, for an unknown name, a missing file or a suffix that is
    neither text nor jsonl.
    """
    if name in CORPORA:
        return CORPORA[name]
    path = Path(name).expanduser()
    known = ", ".join(CORPORA)
    if not path.is_file():
        raise CameraError(
            f"{key}={name}: neither a known corpus ({known}) nor a file that exists; "
            f"name one of them or the path of a text or jsonl file"
        )
    if name.endswith(TEXT_SUFFIXES):
        return Corpus(separator="\n\n", evaluated="file", path=path)
    if name.endswith(JSONL_SUFFIXES):
        return Corpus(separator=None, evaluated="file", path=path)
    raise CameraError(
        f"{key}={name}: the suffix says neither text ({', '.join(TEXT_SUFFIXES)}) nor jsonl "
        f"({', '.join(JSONL_SUFFIXES)}); rename the file to what it holds"
    )


def data_folder(data: str | Path) -> Path | None:
    """The folder behind `data`, or None for the hub; CameraError if the folder does not exist."""
    if str(data) == HUB:
        return None
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise CameraError(
            f"data={data}: no such folder; give a folder in the offline layout ({MIRROR} writes "
            "one) or data=hub"
        )
    return folder


def layout_file(data: str | Path, relative: str) -> Path | None:
    """The file at `relative` in the folder of `data`, None for the hub; CameraError if missing."""
    folder = data_folder(data)
    if folder is None:
        return None
    path = folder / relative
    if not path.is_file():
        raise CameraError(
            f"data={data}: {relative} is missing from that folder; write it with {MIRROR} on a "
            "machine with internet"
        )
    return path


def corpus_file(data: str | Path, corpus: str, split: str) -> Path | None:
    """Where a split is read from, whether the file is there or not; None for the hub."""
    if corpus not in CORPORA:
        return Path(corpus).expanduser()
    relative = CORPORA[corpus].files.get(split)
    if str(data) == HUB or relative is None:
        return None
    return Path(data).expanduser() / relative


def check_corpus(data: str | Path, corpus: str, split: str, *, key: str = "corpus") -> None:
    """Refuse a corpus, split or folder that is not there, without reading it or asking the hub."""
    found = find_corpus(corpus, key=key)
    if found.path is not None:
        return
    if split not in found.files:
        raise CameraError(f"{key}={corpus}: no split {split!r}; it has {', '.join(found.files)}")
    layout_file(data, found.files[split])


def load_documents(
    data: str | Path, corpus: str, split: str, *, key: str = "corpus"
) -> Sequence[str]:
    """The documents of a corpus as text, in the order and the form of the hub's `text` column.

    WikiText-2 gives its lines (each with its newline, blank ones empty), C4 its web pages, a text
    file itself as one document, a jsonl file the `text` of each line. From the hub the sequence
    stays on disk, memory-mapped.

    Raises CameraError for an unknown corpus or split, a missing folder or file, an empty or
    malformed file, and a hub that can't be reached.
    """
    check_corpus(data, corpus, split, key=key)
    found = find_corpus(corpus, key=key)
    path = found.path or layout_file(data, found.files[split])
    documents = _from_hub(found.hub[split]) if path is None else _from_file(found, path)
    if not any(document.strip() for document in documents):
        raise CameraError(f"{key}={corpus}: {path or split} holds no text; write it again")
    return documents


def _from_file(corpus: Corpus, path: Path) -> list[str]:
    if path.name.endswith(JSONL_SUFFIXES):
        return list(_texts(path))
    if corpus.path is not None:
        return ["".join(_lines(path))]
    # The hub's column keeps a line's newline and empties the blank lines: the same text gives the
    # same tokens.
    return [line if line.strip() else "" for line in _lines(path)]


def _from_hub(address: Mapping[str, Any]) -> Sequence[str]:
    with hub_errors(address["path"]):
        import datasets

        return datasets.load_dataset(**address)["text"]


@contextmanager
def hub_errors(dataset: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into a CameraError that names dataset and way out."""
    try:
        yield
    except CameraError:
        raise
    except Exception as error:
        reason = (str(error) or "no reason given").splitlines()[0][:200]
        raise CameraError(
            f"data=hub: dataset {dataset} could not be loaded ({type(error).__name__}: {reason}); "
            f"without internet write a folder with {MIRROR} where there is one and set data=DIR"
        ) from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl(.gz) file; CameraError names the file and the line at fault."""
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CameraError(
                f"{path} line {number} is not JSON ({error.msg}); fix the line or write the file "
                f"again with {MIRROR}"
            ) from error
        if not isinstance(row, dict):
            raise CameraError(
                f"{path} line {number} is not a JSON object; every line must be one, like {{...}}"
            )
        rows.append(_without_lone_surrogates(row) if "\\ud" in line.lower() else row)
    if not rows:
        raise CameraError(f"{path} is empty; write it again with {MIRROR}")
    return rows


def _texts(path: Path) -> Iterator[str]:
    for number, row in enumerate(read_jsonl(path), start=1):
        if not isinstance(row.get("text"), str):
            raise CameraError(
                f"{path} row {number} has no string field `text`; every line must carry its "
                "document there"
            )
        yield row["text"]


def _without_lone_surrogates(value: Any) -> Any:
    """Decoded JSON with U+FFFD for halves of characters, which no UTF-8 text can hold.

    Web text cut in the middle of a character has such escapes.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_lone_surrogates(item) for item in value]
    if isinstance(value, dict):
        pairs = value.items()
        return {_without_lone_surrogates(k): _without_lone_surrogates(v) for k, v in pairs}
    return value


def _lines(path: Path) -> Iterator[str]:
    # newline="\n": other line breaks inside a document are text, not the end of a line. What git or
    # an editor on Windows adds is no text: a byte-order mark, and the \r of every line's end.
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for line in lines:
                yield f"{line[:-2]}\n" if line.endswith("\r\n") else line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CameraError(
            f"{path} can't be read as {'gzipped ' if path.suffix == '.gz' else ''}UTF-8 text "
            f"({error}); write it again"
        ) from error


def rows_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """sha256 of rows in canonical JSON: the same for the hub's rows and for a mirror of them."""
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(dict(row), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
