"""The ranks of a torchrun in step: one that fails alone leaves, those that fail alike go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from camera.runtime import distributed
from experiments.records.failures import one_line

log = logging.getLogger("camera")
PATIENCE = timedelta(seconds=60)  # a refusal comes at about the same time on every rank

_group: Any = None
_apart = False


def join() -> None:
    """Make the ranks known to each other; every rank does so before its first job."""
    global _group
    if distributed.world() > 1 and _group is None:
        import torch.distributed

        _group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def apart() -> bool:
    """Whether this process has lost the others: they may wait for it where it will never come."""
    return _apart


@contextmanager
def together() -> Iterator[None]:
    """A part that all ranks do: where it fails on some only, this process is `apart` from then."""
    global _apart
    try:
        yield
    except BaseException as error:
        if distributed.world() > 1:
            _apart = _apart or not (isinstance(error, Exception) and _all_arrive())
        raise


def follow(part: Callable[[], object]) -> None:
    """Other ranks: do the part whenever rank 0 does; a failure that all share is rank 0's to tell.

    Raises what failed here alone.
    """

    def shared() -> None:
        try:
            with together():
                part()
        except Exception as error:
            if apart():
                raise
            log.debug("as on every rank: %s", one_line(error))

    distributed.work_for_rank_0(shared)


@contextmanager
def leading() -> Iterator[None]:
    """Rank 0: let the others return at the end, if they can still be reached."""
    try:
        yield
    except BaseException:
        _dismiss(quietly=True)
        raise
    _dismiss(quietly=False)


def _dismiss(quietly: bool) -> None:
    global _apart
    if _apart:
        return
    try:
        distributed.stop_workers()
    except RuntimeError as error:  # of the process group: a rank was killed
        _apart = True
        if not quietly:
            raise
        log.warning("The other processes can't be reached: %s", one_line(error))


def _all_arrive() -> bool:
    import torch.distributed

    try:
        torch.distributed.monitored_barrier(_group, timeout=PATIENCE)
    except RuntimeError as error:
        log.warning("The other processes did not fail: %s", one_line(error))
        return False
    return True
