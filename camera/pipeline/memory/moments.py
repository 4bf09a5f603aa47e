"""A sum of memory: the moments of a run that may be its peak, and the parts of each."""

from abc import ABC, abstractmethod


class Moments(ABC):
    """Bytes of each part as fields; a part that a run doesn't have is 0."""

    @property
    @abstractmethod
    def moments(self) -> dict[str, dict[str, int]]:
        """The parts that stand in memory together, by what is done then."""

    @property
    def peak(self) -> int:
        """The most that stands there together."""
        return max(sum(parts.values()) for parts in self.moments.values())
