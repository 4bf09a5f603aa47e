"""The choice between evaluating a model whole and streaming it, by its memory."""

from pathlib import Path

import torch

from camera.checkpoint.loading import resolve_dtype
from camera.checkpoint.quantized.opening import weights_of
from camera.runtime.device import accelerator
from camera.runtime.device.accelerator import all_cards, resolve_device
from camera.runtime.errors import CameraError
from camera.runtime.progress import format_bytes

MODES = ("auto", "always", "never")
MARGIN = 1.2  # of the weights' bytes: activations, fragments, and what else is running


def should_stream(
    folder: Path, device: str = "auto", dtype: str = "auto", mode: str = "auto"
) -> bool:
    """Whether to evaluate layer by layer: `always`, `never`, or `auto`: if the weights, in the
    dtype they are computed in and with a margin, exceed the free memory where they would go.

    That is the accelerators' together for device=auto, the device's own else; on a CPU what the
    system has available. Raises CameraError for another mode, and for `never` where the weights
    alone exceed all that is free.
    """
    if mode not in MODES:
        raise CameraError(f"evaluation.stream={mode} is none of {', '.join(MODES)}.")
    if mode == "always":
        return True
    if mode == "auto":
        return MARGIN * weight_bytes(folder, device, dtype) > free_memory(device)
    require_fit(folder, device, dtype, "evaluation.stream=never", "set evaluation.stream=auto")
    return False


def require_fit(folder: Path, device: str, dtype: str, what: str, way_out: str) -> None:
    """CameraError, before anything is read, where the weights alone exceed all that is free."""
    needed, free = weight_bytes(folder, device, dtype), free_memory(device)
    if all_cards(device) > 1:  # what exceeds the accelerators goes to the system's memory
        free += free_memory("cpu")
    if needed > free:
        raise CameraError(
            f"{what}: the weights of {folder} take {format_bytes(needed)} and "
            f"{format_bytes(free)} are free: {way_out}."
        )


def weight_bytes(folder: Path, device: str = "auto", dtype: str = "auto") -> int:
    """Bytes of a checkpoint's tensors once `load_model` has them in memory."""
    asked = resolve_dtype(dtype)
    if asked is None and torch.device(resolve_device(device)).type == "cpu":
        asked = torch.float32
    return sum(
        place.bytes // place.dtype.itemsize * asked.itemsize
        if asked and place.dtype.is_floating_point
        else place.bytes
        for place in weights_of(folder).places.values()
    )


def free_memory(device: str = "auto") -> int:
    """Bytes free on a device; of `auto` on all accelerators that are this process's alone."""
    place = torch.device(resolve_device(device))
    count = all_cards(device)
    if count > 1 and accelerator.has_own_memory(place):
        return sum(accelerator.free_memory(torch.device(place.type, i)) for i in range(count))
    return accelerator.free_memory(place)
