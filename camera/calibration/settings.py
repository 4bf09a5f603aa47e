"""The settings of calibration: which text, how much of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

from camera.calibration.corpora import CORPORA, check_corpus
from camera.runtime.errors import CameraError
from camera.runtime.values import plain

KEY = "calibration.source"
MIX = "mix"
SELF_SAMPLED = "ebss"  # text that the model itself writes
# Mixtures with a name; those of any sources and shares are `MIX` with `Calibration.sources`.
MIXTURES: dict[str, dict[str, float]] = {"mixed": {"wikitext2": 0.5, "c4": 0.5}}


@dataclass(frozen=True)
class Calibration:
    """A calibration set: `samples` windows of `length` tokens from the `split` of a `source`.

    `source` is wikitext2, c4, mixed (half of each), ebss (written by the model, balanced over its
    experts), the path of a text or jsonl file (neither has splits), or mix: windows of several of
    these, `sources` by their shares, which add up to 1.
    """

    source: str = "wikitext2"
    samples: int = 128
    length: int = 2048
    split: str = "train"
    sources: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if isinstance(self.sources, Mapping):
            shares = {str(name): plain(share) for name, share in self.sources.items()}
            object.__setattr__(self, "sources", shares)


def check_calibration(calibration: Calibration, *, data: str | Path) -> None:
    """Refuse impossible values and absent sources before any weight or text is read."""
    for name, least in (("samples", 1), ("length", 2)):
        value = getattr(calibration, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CameraError(
                f"calibration.{name}={value}: give a whole number of at least {least}"
            )
    source, known = calibration.source, (*CORPORA, *MIXTURES, SELF_SAMPLED)
    if source == MIX or calibration.sources is not None:
        _check_shares(calibration)
    elif source not in known and not Path(source).expanduser().is_file():
        raise CameraError(
            f"calibration.source={source}: neither one of {', '.join(known)} nor "
            f"a file that exists; name one of them or the path of a text or jsonl file"
        )
    shares = shares_of(calibration.source, calibration.sources)
    least = len(shares)
    while len({*deal(list(shares.values()), least)}) < len(shares):
        least += 1
    if calibration.samples < least:
        raise CameraError(
            f"calibration.samples={calibration.samples}: calibration.source={source} draws from "
            f"{len(shares)} corpora; give at least {least}"
        )
    key = KEY if calibration.sources is None else "calibration.sources"
    for name in shares:
        if name != SELF_SAMPLED:
            check_corpus(data, name, calibration.split, key=key)


def _check_shares(calibration: Calibration) -> None:
    """Refuse a mixture that isn't one."""
    sources, key = calibration.sources, "calibration.sources"
    if calibration.source != MIX:
        raise CameraError(
            f"{key} is of calibration={MIX} alone, and calibration.source={calibration.source}: "
            f"set calibration={MIX}, or leave {key} out"
        )
    if not isinstance(sources, Mapping) or not sources:
        raise CameraError(f"{key}={sources}: give shares by name, like {{wikitext2: 0.5, c4: 0.5}}")
    for name, share in sources.items():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
            raise CameraError(f"{key}.{name}={share}: give a share from 0 (left out) to 1")
    if abs(sum(sources.values()) - 1) > 1e-6:
        told = ", ".join(f"{name}: {share:g}" for name, share in sources.items())
        raise CameraError(
            f"{key}={{{told}}}: the shares add up to {sum(sources.values()):g} instead of 1; give "
            "each source its share, and 0 to one that is to be left out"
        )


def shares_of(source: str, sources: Mapping[str, float] | None) -> dict[str, float]:
    """The corpora and files that windows are drawn from, by name, and the share of each."""
    if sources is not None:
        return {name: share for name, share in sources.items() if share > 0}
    return MIXTURES.get(source, {source: 1.0})


def source_name(calibration: Mapping[str, Any]) -> str:
    """The `source` of these settings; of a mixture its sources with their shares in percent."""
    if not calibration.get("sources"):
        return calibration["source"]
    shares = shares_of(calibration["source"], calibration["sources"])
    return " + ".join(f"{name} {100 * share:g}%" for name, share in shares.items())


def deal(shares: list[float], samples: int) -> list[int]:
    """Which source each sample is of: always the one that is furthest behind its share; of equals
    the first. The first samples are so mixed as the whole is."""
    weights = [Fraction(str(share)) for share in shares]
    counts, dealt = [0] * len(shares), []
    for number in range(1, samples + 1):
        behind = [weight * number - n for weight, n in zip(weights, counts, strict=True)]
        chosen = behind.index(max(behind))
        counts[chosen] += 1
        dealt.append(chosen)
    return dealt


def part_of(calibration: Calibration, source: str, samples: int) -> Calibration:
    """The part of a mixture that is drawn from one of its sources."""
    return replace(calibration, source=source, samples=samples, sources=None)
