"""Several processes share the calibration samples: torch.distributed as torchrun sets it up.

Every rank runs its share through the same streamed layers; what was seen is added up before
anything is decided, so that all make the same plan. Rank 0 writes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes that torchrun started; nothing to do in a process of its own."""
    if "WORLD_SIZE" not in os.environ or _joined():
        yield
        return
    from torch import distributed

    from camera.runtime.device.accelerator import share_cards

    timeout = timedelta(days=7)  # rank 0 may evaluate long
    store, rank, world = next(iter(distributed.rendezvous("env://", timeout=timeout)))
    # processes that torchrun starts anew find in its store the addresses of those that were killed
    store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # statistics are on the CPU by the time they are added up
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timeout
    )
    share_cards(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        yield
    finally:
        share_cards(None)
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
    """All ranks' tensors, added up (sum) or element by element the largest (max)."""
    from torch import distributed

    tensor = tensor.contiguous()
    distributed.all_reduce(tensor, getattr(distributed.ReduceOp, how.upper()))
    return tensor


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' tensors."""
    if world() == 1:
        return tensor
    from torch import distributed

    summed = tensor.cpu()
    distributed.all_reduce(summed)
    return summed.to(tensor.device)


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
