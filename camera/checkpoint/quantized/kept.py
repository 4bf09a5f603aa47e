"""What a checkpoint holds as its quantised source stored it: all that nobody changed.

A tensor that equals what the source's parts unpack to is written as these parts, byte for byte. The
experts that stay of a layer are found among the source's by their numbers: in their order, each the
next one that is equal. config.json names the modules that are no longer stored so.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from camera.checkpoint.places import PackedPlace, Place, read_places
from camera.checkpoint.quantized.opening import base_of, names_on_disk
from camera.checkpoint.shards import ShardReader, Sizes, sizes_of
from camera.moe.families import layer_of
from camera.moe.families.family import ExpertNames
from camera.runtime.errors import CameraError

IGNORED = {
    "fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "awq": "modules_to_not_convert",
    "compressed-tensors": "ignore",
}
"""quant_method: the key of quantization_config that names modules which aren't quantised."""
Tensors = dict[str, torch.Tensor]
Parts = dict[str, Place]


class KeptAsStored:
    """The packed tensors of a source, for a checkpoint that is made from it.

    in_memory: the model's name of a tensor on disk. native: whether tensors are written by the
    names of native checkpoints, which are the source's, instead of those in memory.
    """

    def __init__(
        self,
        reader: ShardReader,
        experts: ExpertNames,
        in_memory: Callable[[str], str],
        native: bool,
    ):
        self._told: Mapping[str, Any] = reader.quantisation or {}
        self.native, self._experts, self._in_memory = native, experts, in_memory
        method = self._told.get("quant_method")
        if native and self._told and method not in IGNORED:
            raise CameraError(
                "store=source: the config.json of a native checkpoint can't say which of its "
                f"modules are still stored as {method}: set store=bfloat16."
            )
        self._places: dict[str, PackedPlace] = {}  # by the names that are written
        self._parts: dict[str, Parts] = {}  # of each, by the ends of their names
        self._needed: dict[str, list[str]] = {}  # ends of those without which it isn't read
        self._lost: set[str] = set()  # that are certain to be written otherwise
        for key, (needed, beside) in names_on_disk(reader).items():
            name, base = key if native else in_memory(key), base_of(key)
            if not native and experts.holds(key):
                self._lost.add(name)
                continue
            self._places[name] = reader.places[key]
            self._needed[name] = [part.removeprefix(base) for part in needed]
            self._parts[name] = {p.removeprefix(base): reader.held[p] for p in needed + beside}
        self._by_kind: dict[str, list[str]] = {}  # names of a matrix, in the order of the experts
        for name in sorted(self._places, key=lambda name: experts.number(name) or 0):
            self._by_kind.setdefault(experts.as_first(name), []).append(name)
        self._bases = {base_of(kind) for kind in self._by_kind}

    @property
    def nbytes(self) -> int:
        """Bytes of the parts of the largest layer, or of all that is outside the layers."""
        layers: dict[int | None, int] = {}
        for name, parts in self._parts.items():
            layer = layer_of(name)
            layers[layer] = layers.get(layer, 0) + sum(part.bytes for part in parts.values())
        return max(layers.values(), default=0)

    def holds(self, key: str) -> bool:
        """Whether a tensor on disk belongs to one that may be kept."""
        return f"{self._experts.as_first(key).rpartition('.')[0]}." in self._bases

    def restored(self, tensors: Tensors) -> tuple[Tensors, Sizes]:
        """Tensors as they are written, those that equal the source's by its parts; and the numbers
        and bytes of each plain one, by its name in memory. `tensors` is emptied."""
        found: dict[str, Tensors] = {}
        for group, names in _by_group(self._experts, tensors).items():
            if group is not None:
                found |= self._same_experts({name: tensors[name] for name in names})
                continue
            same = [name for name in names if self._is_same(name, tensors[name])]
            found |= {name: read_places(self._parts[name]) for name in same}
        written: Tensors = {}
        sizes: Sizes = {}
        for name in list(tensors):
            plain = {name: tensors.pop(name)}
            numbers = plain[name].numel()
            if name in found:
                plain = {f"{base_of(name)}{end}": part for end, part in found.pop(name).items()}
            known = self._in_memory(name) if self.native else name
            before, size = sizes.get(known, (0, 0)), sum(b for _, b in sizes_of(plain).values())
            sizes[known] = before[0] + numbers, before[1] + size
            written |= plain
        return written, sizes

    def quantisation(self, written: Collection[str]) -> dict[str, Any] | None:
        """What config.json says of these tensors, written by `restored`; None if all are plain."""
        kept = {name for name in self._places if self._is_packed(name, written)}
        if not kept:
            return None
        told = dict(self._told)
        if told.get("kv_cache_scheme"):  # whose scales are no module's: they are left out
            told["kv_cache_scheme"] = None
        method = told["quant_method"]
        lost = {self._module(name) for name in (self._places.keys() - kept) | self._lost}
        if method in IGNORED and lost:
            more = [_pattern(path) for path in lost] if method == "compressed-tensors" else lost
            told[IGNORED[method]] = [*(told.get(IGNORED[method]) or []), *sorted(more)]
        return told

    def _is_packed(self, name: str, written: Collection[str]) -> bool:
        base = base_of(self._experts.as_first(name))  # experts that stay are numbered from 0
        return all(f"{base}{end}" in written for end in self._needed[name])

    def _module(self, name: str) -> str:
        return _group(self._experts, name) or base_of(name).removesuffix(".")

    def _is_same(self, name: str, tensor: torch.Tensor) -> bool:
        place = self._places.get(name)
        return place is not None and _equal(place, tensor)

    def _same_experts(self, tensors: Tensors) -> dict[str, Tensors]:
        """The parts of all experts of a layer; nothing where one of them isn't the source's."""
        found: dict[str, Tensors] = {}
        kinds: dict[str, list[str]] = {}
        for name in tensors:
            kinds.setdefault(self._experts.as_first(name), []).append(name)
        for kind, names in kinds.items():
            if kind in self._places and self._experts.number(kind) is None:
                parts = self._same_rows(kind, tensors[kind])
                same = {} if parts is None else {kind: parts}
            elif kind in self._places:
                names.sort(key=self._experts.number)
                same = self._same_numbers(names, tensors)
            else:
                continue  # plain in the source
            if not same:
                return {}
            found |= same
        return found

    def _same_numbers(self, names: list[str], tensors: Tensors) -> dict[str, Tensors]:
        """Of experts with tensors of their own, in the order of their numbers."""
        there, found, first = self._by_kind[self._experts.as_first(names[0])], {}, 0
        removed = len(there) - len(names)
        for number, name in enumerate(names):
            for at in range(first, number + removed + 1):
                if self._is_same(there[at], tensors[name]):
                    found[name], first = read_places(self._parts[there[at]]), at + 1
                    break
            else:
                return {}
        return found

    def _same_rows(self, name: str, tensor: torch.Tensor) -> Tensors | None:
        """Of experts in one tensor, a row each."""
        place, parts = self._places[name], self._parts[name]
        removed = place.shape[0] - tensor.shape[0]
        if not place.stacked or len(parts) > len(self._needed[name]):
            return read_places(parts) if self._is_same(name, tensor) else None
        rows: list[int] = []
        for number in range(len(tensor)):
            first = rows[-1] + 1 if rows else 0
            tried = range(first, number + removed + 1)
            one = tensor[number : number + 1]
            at = next((at for at in tried if _equal(place.rows(at, 1), one)), None)
            if at is None:
                return None
            rows.append(at)
        return {
            end: torch.cat([read_places({"": part.rows(at, 1)})[""] for at in rows])
            for end, part in parts.items()
        }


def _group(experts: ExpertNames, name: str) -> str | None:
    """The module of the routed experts that a tensor belongs to."""
    if not experts.holds(name):
        return None
    found = experts.one.search(name)
    return name[: found.start(2)].removesuffix(".") if found else name.rpartition(".")[0]


def _by_group(experts: ExpertNames, names: Iterable[str]) -> dict[str | None, list[str]]:
    found: dict[str | None, list[str]] = {}
    for name in names:
        found.setdefault(_group(experts, name), []).append(name)
    return found


def _equal(place: PackedPlace, tensor: torch.Tensor) -> bool:
    if place.shape != tuple(tensor.shape):
        return False
    plain = read_places({"": place}, tensor.device)[""]
    return torch.equal(plain.to(tensor.dtype), tensor)


def _pattern(path: str) -> str:
    """Of compressed-tensors, for a module and all in it."""
    return f"re:{re.escape(path)}(\\..*)?$"
