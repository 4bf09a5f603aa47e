"""Export of a compressed checkpoint as one of the base model's own type."""

from __future__ import annotations

from pathlib import Path

from camera.checkpoint.config import save_config
from camera.checkpoint.formats.native import native_state
from camera.checkpoint.matching import require_whole
from camera.checkpoint.shards import ShardReader, ShardWriter, sizes_of
from camera.checkpoint.source import copy_companions
from camera.engines.plain import PlainModel
from camera.runtime.errors import CameraError
from camera.runtime.files import published


def export_native(plain: PlainModel, out: Path) -> None:
    """Write a native checkpoint whose logits equal the compressed model's, a layer at a time.

    CameraError for a model that isn't compressed.
    """
    if not plain.compressed:
        raise CameraError(f"{plain.folder} is not a compressed checkpoint: nothing to export.")
    layers = len(plain.source.layers)
    with published(out) as partial:
        partial.mkdir()
        writer = ShardWriter(partial, layers + 1)
        for index, tensors in plain.layers():
            writer.add(index, native_state(plain.model, tensors), sizes_of(tensors))
        rest = plain.rest()
        writer.add(layers, native_state(plain.model, rest), sizes_of(rest))
        writer.close()
        plain.config.architectures = [type(plain.model).__name__]
        plain.config.dtype = plain.dtype
        save_config(plain.config, partial)
        copy_companions(plain.folder, partial)
        require_whole(plain.config, ShardReader(partial))
