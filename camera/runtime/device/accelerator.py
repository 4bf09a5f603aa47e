"""What the device of a run can do; every question goes to `torch.accelerator`, and from here alone.

Any accelerator that torch sees counts, whatever its name. A CPU, and an accelerator that shares the
system's memory (mps), has no memory of its own: nothing is copied to it beside the computing.
"""

from contextlib import AbstractContextManager

import torch
from torch.nn import functional as F

from camera.runtime.device.host_memory import free_host_memory, total_host_memory
from camera.runtime.errors import CameraError

SHARING = ("cpu", "mps", "meta")  # the system's memory is theirs
GROUPING = (9, 10)  # CUDA architectures for which torch has a kernel of grouped products

_card: int | None = None  # this process's number among those that share the cards
_ranks = 0  # of torchrun on this machine; 0: they need not have a card each


def resolve_device(device: str) -> str:
    """`auto` is the accelerator torch sees, else the CPU; CameraError for one it hasn't got.

    An accelerator without a number is, in a process that shares the cards, the one that
    `share_cards` gave it.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = (found.type if found else "cpu") if device == "auto" else device
    try:
        asked = torch.device(kind)
    except RuntimeError as error:
        raise CameraError(f"device={device} is no device: use auto, cpu or cuda.") from error
    count = torch.accelerator.device_count() if found and asked.type == found.type else 0
    if asked.type != "cpu" and (asked.index or 0) >= count:
        raise CameraError(f"device={device} is not available here: use device=auto or device=cpu.")
    if asked.type == "cpu" or asked.index is not None or _card is None:
        return kind
    if _ranks > count:
        raise CameraError(
            f"device={device}: torchrun started {_ranks} processes on this machine, which has "
            f"{count} {asked.type}: start it with --nproc-per-node={count}, or set device=cpu."
        )
    return f"{asked.type}:{_card % count}"


def share_cards(number: int | None, *, ranks: int = 0) -> None:
    """Give this process the card of its number, wherever no other is asked for by number.

    Numbers beyond the last card begin again at the first; so many `ranks` need a card each. None:
    all cards are this process's own.
    """
    global _card, _ranks
    _card, _ranks = number, ranks


def all_cards(device: str) -> int:
    """How many cards a model may be spread over: all for `auto` in a process alone, else one.

    0 where torch sees none.
    """
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    return count if device == "auto" and _card is None else min(count, 1)


def make_current(device: torch.device) -> None:
    """In a process that shares the cards: allocate on this one where nothing else is said.

    Pinned memory and communicators belong to the current card, number 0 for all otherwise.
    """
    if _card is not None and device.index is not None:
        torch.accelerator.set_device_index(device.index)


def current_device(device: torch.device) -> AbstractContextManager:
    """A block whose kernels, if they aren't torch's own, are launched on this device."""
    return torch.accelerator.device_index(device.index)


def has_own_memory(device: torch.device) -> bool:
    """Whether the device has memory of its own, to which tensors are copied."""
    return device.type not in SHARING


def synchronize(device: torch.device | str) -> None:
    """Wait until this device, not the current one, has done what it was told."""
    device = torch.device(device)
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the system's where it has none of its own."""
    if not has_own_memory(device):
        return free_host_memory()
    torch.accelerator.empty_cache()
    return _memory_info(device)[0]


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory; of the system's where it has none of its own."""
    if not has_own_memory(device):
        return total_host_memory()
    return _memory_info(device)[1]


def _memory_info(device: torch.device) -> tuple[int, int]:
    # torch.accelerator says it from 2.10 on, the device's own module did before
    return torch.get_device_module(device).mem_get_info(device)


def release_cache() -> None:
    """Return what the accelerator's allocator holds without need."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def side_stream(device: torch.device) -> torch.Stream | None:
    """A new stream for copies beside the computing; None where there is nothing to copy."""
    return torch.Stream(device=device) if has_own_memory(device) else None


def current_stream(device: torch.device) -> torch.Stream:
    """The stream that this thread computes on."""
    return torch.accelerator.current_stream(device)


def device_name(device: torch.device) -> str | None:
    """The card's name as its maker calls it; None for a CPU."""
    if device.type in ("cpu", "meta"):
        return None
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return ask(device) if ask else device.type


def has_grouped_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` is one kernel: CUDA 9.x and 10.x in bf16.

    Elsewhere it waits for the groups' sizes and loops over them.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device)[0] in GROUPING
