"""The weights of a folder as plain tensors, whatever they are stored as."""

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from camera.checkpoint.config import NAMES, CameraConfig, json_object
from camera.checkpoint.places import PackedPlace, Place
from camera.checkpoint.quantized import awq, compressed_tensors, fp8, gptq, mxfp4
from camera.checkpoint.quantized.stored import StoredWeights
from camera.checkpoint.shards import ShardReader
from camera.moe.budget import owner_of
from camera.runtime.errors import CameraError

log = logging.getLogger("camera")
QUANTIZED = "quantization_config"  # of config.json, or of its text_config
Unpacking = Callable[[StoredWeights], dict[str, PackedPlace]]
"""unpacking(stored): the plain tensors that packed ones make, by name."""
FORMATS: dict[str, tuple[Unpacking, tuple[str, ...]]] = {
    "fp8": (fp8.unpacked, fp8.BESIDE),
    "mxfp4": (mxfp4.unpacked, mxfp4.BESIDE),
    "compressed-tensors": (compressed_tensors.unpacked, compressed_tensors.BESIDE),
    "gptq": (gptq.unpacked, gptq.BESIDE),
    "awq": (awq.unpacked, awq.BESIDE),
}
"""quant_method: how it is unpacked, and ends of names that a plain model has no use for."""


def open_weights(folder: Path, config: Any) -> ShardReader:
    """The weights of a folder; those that another tool quantised are unpacked as they are read, to
    the dtype that config.json says, and `config` becomes that of the plain model.

    CameraError for a quantisation that isn't read, and for packed tensors without their scales.
    """
    told, compressed = _take_off(config)
    plain = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    return _opened(folder, told, plain, compressed)


def weights_of(folder: Path) -> ShardReader:
    """As `open_weights`, by config.json alone: the classes that it names aren't looked for."""
    config = json_object(folder / "config.json")
    parts = [config, *(inner for inner in [config.get("text_config")] if isinstance(inner, dict))]
    told = next((part[QUANTIZED] for part in parts if isinstance(part.get(QUANTIZED), dict)), None)
    compressed = None
    if told is not None and told.get("quant_method") in NAMES:
        told, compressed = told.get("source"), told.get("modules", {})
    named = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    plain = getattr(torch, str(next(filter(None, named), "bfloat16")), torch.bfloat16)
    return _opened(folder, told, plain, compressed)


def names_on_disk(reader: ShardReader) -> dict[str, tuple[list[str], list[str]]]:
    """Of each tensor that is unpacked the names of its parts, and of what lies beside them: scales
    of activations, which a plain model has no use for."""
    names = {place: key for key, place in reader.held.items()}
    beside: dict[str, list[str]] = {}
    for key in reader.left_out.keys() & reader.held.keys():
        beside.setdefault(f"{key.rpartition('.')[0]}.", []).append(key)
    return {
        key: ([names[part] for part in place.stored], sorted(beside.get(base_of(key), [])))
        for key, place in reader.places.items()
        if isinstance(place, PackedPlace)
    }


def base_of(key: str) -> str:
    """What the names of a plain tensor and of its parts begin with."""
    return key.removesuffix("weight") if key.endswith(".weight") else key


def _opened(
    folder: Path,
    told: dict[str, Any] | None,
    plain: torch.dtype,
    compressed: Collection[str] | None,
) -> ShardReader:
    """compressed: paths of modules whose tensors their formats read; None: there are no formats."""
    reader = ShardReader(folder)
    if told is None:
        if compressed is None:
            _refuse_packed(reader, "config.json has no quantization_config")
        return reader
    method = told.get("quant_method") if isinstance(told, dict) else told
    if method not in FORMATS:
        raise CameraError(
            f"{folder} is quantised by {method!r}, and only {', '.join(FORMATS)} can be unpacked: "
            "start from its unquantised weights."
        )
    unpacked, beside = FORMATS[method]
    reader.quantisation = told
    stored = {
        key: place
        for key, place in reader.held.items()
        if not compressed or owner_of(key, compressed) is None
    }
    found = unpacked(StoredWeights(folder, stored, told, plain))
    parts = {part for place in found.values() for part in place.stored}
    for key, place in stored.items():
        if place in parts:
            del reader.places[key]
    for key in found:
        if key in reader.places:
            raise CameraError(
                f"{folder} holds tensor '{key}' plain and packed: download the model again."
            )
    reader.places |= found
    reader.leave_out([key for key in stored if key in reader.places and key.endswith(beside)])
    _refuse_packed(reader, f"its parts for {method} are missing")
    log.info(
        "%s is stored as %s: %d tensors are unpacked to %s as they are read.",
        folder, method, len(found), str(plain).removeprefix("torch."),
    )  # fmt: skip
    return reader


def _take_off(config: Any) -> tuple[dict[str, Any] | None, Collection[str] | None]:
    """What a config says of another tool's quantisation, which it then no longer says; and which
    modules have a format of this package, in a checkpoint of it."""
    told, compressed = None, None
    for part in (config, config.get_text_config()):
        found = getattr(part, QUANTIZED, None)
        if isinstance(found, CameraConfig):
            told, compressed = found.source or told, found.modules
            found.source = None
            continue
        if found is None:
            continue
        if not isinstance(found, dict):
            raise CameraError(
                f"config.json says {QUANTIZED}={found!r}, which is no object: take the config.json "
                "that was written with these weights."
            )
        told = found
        delattr(part, QUANTIZED)
    return told, compressed


def _refuse_packed(reader: ShardReader, why: str) -> None:
    """CameraError for a tensor that would be loaded as numbers that it doesn't hold."""
    for key, place in reader.places.items():
        if isinstance(place, Place) and place.dtype.is_floating_point and place.dtype.itemsize == 1:
            kind = str(place.dtype).removeprefix("torch.")
            raise CameraError(
                f"tensor '{key}' in {reader.folder} is {kind}, and {why}: take the config.json and "
                "all files of that model."
            )
