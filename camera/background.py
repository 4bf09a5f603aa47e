"""One piece of work at a time, done beside the main thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter


class Background:
    """Runs what it is given in a thread; never more than one piece is under way.

    An error surfaces at the next call. `seconds_worked` is what the work took, `seconds_waited` the
    part of it that the main thread stood still for.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._work: Future | None = None
        self.seconds_worked = self.seconds_waited = 0.0

    def submit(self, work: Callable[[], None]) -> None:
        """Start a piece of work once the last one is done."""
        self.wait()
        self._work = self._thread.submit(self._timed, work)

    def _timed(self, work: Callable[[], None]) -> None:
        start = perf_counter()
        try:
            work()
        finally:
            self.seconds_worked += perf_counter() - start

    def wait(self) -> None:
        """Return when nothing is under way."""
        if self._work is not None:
            start, work = perf_counter(), self._work
            self._work = None
            try:
                work.result()
            finally:
                self.seconds_waited += perf_counter() - start

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
