"""Export of a checkpoint in the format that another program reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal, get_args

from camera.engines.approximate_experts import export_approximate_experts
from camera.engines.compressed_tensors import bits_of, export_compressed_tensors
from camera.engines.gguf.file import export_gguf
from camera.engines.native import export_native
from camera.engines.plain import WIDTH_MULTIPLE, PlainModel
from camera.runtime.errors import CameraError
from camera.runtime.files import CheckpointFiles, refuse_existing

log = logging.getLogger("camera")
SMALLER = 0.98  # of the original: an export above that isn't worth it
PADDED = "every expert is padded to the widest: method.expert_widths=uniform leaves all one width"
UNPACKED = "codes are unpacked: --format compressed-tensors keeps them, where it has their bits"
ExportFormat = Literal["native", "gguf", "compressed-tensors", "approximate-experts"]


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: ExportFormat | None = None,
    width_multiple: int = WIDTH_MULTIPLE,
    type: str | None = None,
    template: str | Path | None = None,
    pre: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a compressed checkpoint so that programs without this package read it, a layer at a
    time; returns `out`.

    format: native, a folder of the base model's own type for transformers, vLLM and SGLang; gguf, a
    file for llama.cpp (the default where `out` ends in .gguf); compressed-tensors, a quantised
    folder for vLLM; approximate-experts, a folder for vLLM of a checkpoint in which constants stand
    in the place of experts, which no other format holds. Experts are zero-padded to
    the widest one's width, rounded up to a multiple of `width_multiple`; the log says what that
    weighs before it is written. type, template, pre: of `camera.engines.gguf.file.export_gguf`,
    which also writes models that aren't compressed. Raises CameraError for what can't be exported.
    """
    out = Path(out).expanduser()
    format = format or ("gguf" if out.suffix == ".gguf" else "native")
    if format not in get_args(ExportFormat):
        raise CameraError(f"format={format} is none of {', '.join(get_args(ExportFormat))}.")
    refuse_existing(out)
    if format != "gguf" and (type or template or pre):
        raise CameraError("type, template and pre belong to format=gguf.")
    if format == "compressed-tensors":
        export_compressed_tensors(checkpoint, out, trust_remote_code)
        return out
    if format == "approximate-experts":
        export_approximate_experts(checkpoint, out, trust_remote_code)
        return out
    plain = PlainModel(checkpoint, width_multiple, trust_remote_code)
    if format == "gguf":
        template = Path(template).expanduser() if template else None
        export_gguf(plain, out, type, template, pre)
        log.info("%s: GGUF, %.1f MB.", out, out.stat().st_size / 1e6)
        return out
    _say_size(plain)
    export_native(plain, out)
    log.info("%s: %s", out, _summary(plain))
    return out


def _say_size(plain: PlainModel) -> None:
    """Warn, before anything is written, of an export that isn't smaller than the original."""
    original = _original_bytes(plain.folder)
    if original is not None and plain.nbytes >= SMALLER * original:
        quantised = any(bits_of(spec) for spec in plain.modules.values())
        log.warning(
            "this export will weigh %.1f MB and the original weighs %.1f MB, since %s.",
            plain.nbytes / 1e6,
            original / 1e6,
            UNPACKED if quantised else PADDED,
        )


def _original_bytes(folder: Path) -> int | None:
    """Bytes of the model's weights before compression, by the checkpoint's report."""
    path = folder / CheckpointFiles.REPORT
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())["bytes"]["dense"]
    except (ValueError, KeyError, TypeError) as error:
        raise CameraError(f"{path} is no report of a compression: remove it.") from error


def _summary(plain: PlainModel) -> str:
    """Dtype, width and size, beside those of the compressed checkpoint and of the original."""
    keys = plain.family.keys
    key = keys.width if any(key == keys.width for key, _ in plain.widths) else keys.dense_width
    dtype = str(plain.dtype).removeprefix("torch.")
    told = f"native, {dtype}, every expert {getattr(plain.config.get_text_config(), key)} wide, "
    told += f"{plain.nbytes / 1e6:.1f} MB; compressed {plain.source.reader.bytes / 1e6:.1f} MB"
    original = _original_bytes(plain.folder)
    return told + (f", original {original / 1e6:.1f} MB." if original else ".")
