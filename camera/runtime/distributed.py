"""Several processes share the calibration samples: torch.distributed as torchrun sets it up.

Every rank runs its share through the same streamed layers; what was seen is added up before
anything is decided, so that all make the same plan. Rank 0 writes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

OPERATIONS = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes that torchrun started; nothing to do in a process of its own."""
    if "WORLD_SIZE" not in os.environ or distributed.is_initialized():
        yield
        return
    timeout = timedelta(days=7)  # rank 0 may evaluate long
    store, rank, world = next(iter(distributed.rendezvous("env://", timeout=timeout)))
    # processes that torchrun starts anew find in its store the addresses of those that were killed
    store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # statistics are on the CPU by the time they are added up
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timeout
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Which of the processes this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(ids_NL: torch.Tensor) -> torch.Tensor:
    """The samples that are this rank's: as many as the others', or one more."""
    return ids_NL.tensor_split(world())[rank()]


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' tensors."""
    if world() == 1:
        return tensor
    summed = tensor.cpu()
    distributed.all_reduce(summed)
    return summed.to(tensor.device)


def least(number: int) -> int:
    """The smallest of all ranks' numbers."""
    if world() == 1:
        return number
    tensor = torch.tensor(number)
    distributed.all_reduce(tensor, distributed.ReduceOp.MIN)
    return int(tensor)


def barrier() -> None:
    """Wait for the other ranks."""
    if world() > 1:
        distributed.barrier()


def call() -> None:
    """Rank 0: have the ranks that `follow` do their part once."""
    _tell(1)


def release() -> None:
    """Rank 0: let the ranks that `follow` go."""
    _tell(0)


def follow(part: Callable[[], object]) -> None:
    """Other ranks: do a part of the work whenever rank 0 says so, until it is done."""
    while _tell(0):
        part()


def _tell(word: int) -> int:
    if world() == 1:
        return word
    tensor = torch.tensor(word)
    distributed.broadcast(tensor, src=0)
    return int(tensor)
