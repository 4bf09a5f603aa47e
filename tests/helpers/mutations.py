"""What may be wrong with the files of a checkpoint, by name: changes of a folder, in place."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from camera.checkpoint.shards import INDEX

Change = Callable[[Path], object]
DROPPED = object()
VALUES = (None, [], 0, -1, 3, "7", 2**40, float("nan"), DROPPED)
TEXTS = ("null", "[]", "3", "{", "", "{}", "\ufeff{}")
TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "gone": lambda t: None,
    "empty": lambda t: t[:0],
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.t() if t.dim() == 2 else t[None],
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "one row less": lambda t: t[:-1],
    "int8": lambda t: t.to(torch.int8),
    "half": lambda t: t.half() if t.is_floating_point() else t,
    "float64": lambda t: t.double(),
    "NaN": lambda t: t.float() * torch.nan,
}


def told(value: Any) -> str:
    """How a value is called in the name of a test."""
    return "dropped" if value is DROPPED else "huge" if value == 2**40 else repr(value)


def edited(name: str, change: Callable[[Any], Any]) -> Change:
    """Change what a JSON file says; None where that happens in place."""

    def go(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        new = change(said)
        (folder / name).write_text(json.dumps(said if new is None else new))

    return go


def keyed(name: str, *path: str, value: Any) -> Change:
    """Set a key of a JSON file, or drop it."""

    def change(said: Any) -> None:
        for part in path[:-1]:
            said = said[part]
        if value is DROPPED:
            said.pop(path[-1], None)
        else:
            said[path[-1]] = value

    return edited(name, change)


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def shard_of(folder: Path, key: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][key]


def rewritten(path: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors of a safetensors file; its metadata stay."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata=metadata)


def tensor(key: str, kind: str) -> Change:
    """Damage one tensor; the index goes on listing it."""

    def change(tensors: dict) -> None:
        damaged = TENSORS[kind](tensors.pop(key))
        if damaged is not None:
            tensors[key] = damaged

    return lambda folder: rewritten(shard_of(folder, key), change)


def renamed(key: str, name: str) -> Change:
    def go(folder: Path) -> None:
        rewritten(shard_of(folder, key), lambda ts: ts.update({name: ts.pop(key)}))
        edited(INDEX, lambda said: _move(said["weight_map"], key, name))(folder)

    return go


def _move(where: dict, key: str, name: str) -> None:
    where[name] = where.pop(key)


def doubled(key: str, factor: float) -> Change:
    """The tensor, times a factor, in another shard too."""

    def go(folder: Path) -> None:
        own = shard_of(folder, key)
        other = next(path for path in shards(folder) if path != own)
        rewritten(other, lambda ts: ts.update({key: load_file(own)[key] * factor}))

    return go


def cut(length: int) -> Change:
    """The first shard ends after so many bytes, counted from its end if negative."""

    def go(folder: Path) -> None:
        path = shards(folder)[0]
        path.write_bytes(path.read_bytes()[:length])

    return go


def of_the_index(key: str) -> Iterator[tuple[str, Change]]:
    """What may be wrong with the index, where it lists the tensor `key`."""
    for content in TEXTS:
        yield f"index {content!r}", text(INDEX, content)
    for value in (None, [], {}, "x"):
        yield f"weight_map {value!r}", keyed(INDEX, "weight_map", value=value)
    for name in (None, 3, "", "..", "../stolen.safetensors", "/dev/null", "gone.safetensors"):
        yield f"listed in {name!r}", keyed(INDEX, "weight_map", key, value=name)
    yield "not listed", keyed(INDEX, "weight_map", key, value=DROPPED)
    yield "listed, not there", keyed(INDEX, "weight_map", "ghost", value="gone.safetensors")
    yield "listed in another shard", lambda folder: _mislead(folder, key)
    yield "no metadata", keyed(INDEX, "metadata", value=DROPPED)
    yield "no index", lambda folder: (folder / INDEX).unlink()


def _mislead(folder: Path, key: str) -> None:
    own = shard_of(folder, key)
    other = next(path for path in shards(folder) if path != own)
    keyed(INDEX, "weight_map", key, value=other.name)(folder)


def of_the_shards(key: str) -> Iterator[tuple[str, Change]]:
    """What may be wrong with the files of weights."""
    for length in (0, 4, 8, 100, -1, -100):
        yield f"cut at {length}", cut(length)
    yield "a shard is gone", lambda folder: shards(folder)[0].unlink()
    yield "a shard of noise", lambda folder: shards(folder)[0].write_bytes(b"\xff" * 4096)
    yield "doubled", doubled(key, 1.0)
    yield "doubled, another", doubled(key, 2.0)
    yield "renamed", renamed(key, f"{key}_x")
