"""Several processes share the calibration samples: torch.distributed as torchrun sets it up.

Every rank runs its share through the same streamed layers; what was seen is added up before
anything is decided, so that all make the same plan. Rank 0 writes.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

PATIENCE = timedelta(days=7)  # rank 0 may evaluate long


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes that torchrun started; nothing to do in a process of its own."""
    if "WORLD_SIZE" not in os.environ or _joined():
        yield
        return
    from torch import distributed

    from camera.runtime.device.accelerator import share_cards

    store, rank, world = next(iter(distributed.rendezvous("env://", timeout=PATIENCE)))
    # processes that torchrun starts anew find in its store the addresses of those that were killed
    store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # the host's tensors; what lies on cards may have a group of its own
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE
    )
    number, ranks = (int(os.environ.get(key, 0)) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    share_cards(number, ranks=ranks)
    try:
        yield
    finally:
        share_cards(None)
        _groups.clear()
        distributed.destroy_process_group()


def rank() -> int:
    """Which of the processes this is, from 0."""
    return sys.modules["torch.distributed"].get_rank() if _joined() else 0


def world() -> int:
    """How many processes there are."""
    return sys.modules["torch.distributed"].get_world_size() if _joined() else 1


def shard_samples(ids_NL: torch.Tensor) -> torch.Tensor:
    """The samples that are this rank's: as many as the others', or one more."""
    return ids_NL.tensor_split(world())[rank()]


def all_combined(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """All ranks' tensors, added up (sum) or element by element the largest (max), where it lies.

    Between cards by their own library (NCCL), if every rank has one of its own; else by gloo, which
    knows the host's memory alone.
    """
    from torch import distributed

    operation = getattr(distributed.ReduceOp, how.upper())
    group = _group_of_cards(tensor.device)
    if group is not None:
        tensor = tensor.contiguous()
        distributed.all_reduce(tensor, operation, group=group)
        return tensor
    on_host = tensor.cpu().contiguous()
    distributed.all_reduce(on_host, operation)
    return on_host.to(tensor.device)


_groups: dict[str, ProcessGroup | None] = {}  # by kind of device, once asked for


def _group_of_cards(device: torch.device) -> ProcessGroup | None:
    """All ranks by the library of their cards; None where it isn't there or two share a card.

    Every rank asks at the same place, and gets the same answer.
    """
    if device.type == "cpu":
        return None
    if device.type not in _groups:
        from torch import distributed

        backend = distributed.Backend.default_device_backend_map.get(device.type, "gloo")
        mine = (socket.gethostname(), str(device), backend)
        everyone: list[Any] = [None] * world()
        distributed.all_gather_object(everyone, mine)
        apart = _have_their_own(everyone)
        _groups[device.type] = (
            distributed.new_group(backend=backend, timeout=PATIENCE) if apart else None
        )
    return _groups[device.type]


def _have_their_own(everyone: Sequence[tuple[str, str, str]]) -> bool:
    """Whether no two of (host, card, backend) share a card, and one backend serves all."""
    from torch import distributed

    backends = {backend for _, _, backend in everyone}
    if len(set(everyone)) < len(everyone) or len(backends) > 1:
        return False
    backend = backends.pop()
    return backend != "gloo" and getattr(distributed, f"is_{backend}_available", lambda: True)()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' tensors."""
    return tensor if world() == 1 else all_combined(tensor, "sum")


def all_min(number: int) -> int:
    """The smallest of all ranks' numbers."""
    if world() == 1:
        return number
    import torch
    from torch import distributed

    tensor = torch.tensor(number)
    distributed.all_reduce(tensor, distributed.ReduceOp.MIN)
    return int(tensor)


def barrier() -> None:
    """Wait for the other ranks."""
    if world() > 1:
        from torch import distributed

        distributed.barrier()


def start_workers() -> None:
    """Rank 0: start one unit of work on all ranks."""
    _tell(1)


def stop_workers() -> None:
    """Rank 0: let the other ranks return."""
    _tell(0)


def work_for_rank_0(part: Callable[[], object]) -> None:
    """Other ranks: do a unit of work whenever rank 0 starts one, until it stops them."""
    while _tell(0):
        part()


def _tell(word: int) -> int:
    if world() == 1:
        return word
    import torch
    from torch import distributed

    tensor = torch.tensor(word)
    distributed.broadcast(tensor, src=0)
    return int(tensor)


def _joined() -> bool:
    # a process that never loaded torch is in no group
    module = sys.modules.get("torch.distributed")
    return module is not None and module.is_initialized()
