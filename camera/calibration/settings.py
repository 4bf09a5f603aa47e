"""The settings of calibration: which text, how much of it."""

from dataclasses import dataclass, replace
from pathlib import Path

from camera.calibration.corpora import CORPORA, check_corpus
from camera.runtime.errors import CameraError
from camera.runtime.values import plain

KEY = "calibration.source"


# A source is a corpus of `camera.calibration.corpora.CORPORA`, a local file, or one of these:
# equal shares of several corpora.
MIXTURES: dict[str, tuple[str, ...]] = {"mixed": ("wikitext2", "c4")}


@dataclass(frozen=True)
class Calibration:
    """A calibration set: `samples` windows of `length` tokens from the `split` of a `source`.

    `source` is wikitext2, c4, mixed (half of each), or the path of a text or jsonl file (which has
    no splits).
    """

    source: str = "wikitext2"
    samples: int = 128
    length: int = 2048
    split: str = "train"

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            object.__setattr__(self, name, plain(getattr(self, name)))


def check_calibration(calibration: Calibration, *, data: str | Path) -> None:
    """Refuse impossible values and absent sources before any weight or text is read."""
    for name, least in (("samples", 1), ("length", 2)):
        value = getattr(calibration, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CameraError(
                f"calibration.{name}={value}: give a whole number of at least {least}"
            )
    source = calibration.source
    if source not in (*CORPORA, *MIXTURES) and not Path(source).expanduser().is_file():
        raise CameraError(
            f"calibration.source={source}: neither one of {', '.join((*CORPORA, *MIXTURES))} nor "
            f"a file that exists; name one of them or the path of a text or jsonl file"
        )
    parts = _parts(calibration)
    if calibration.samples < len(parts):
        raise CameraError(
            f"calibration.samples={calibration.samples}: calibration.source={source} draws from "
            f"{len(parts)} corpora; give at least {len(parts)}"
        )
    for part in parts:
        check_corpus(data, part.source, calibration.split, key=KEY)


def _parts(calibration: Calibration) -> list[Calibration]:
    """One calibration per corpus of the source, with its share of the samples."""
    names = MIXTURES.get(calibration.source, (calibration.source,))
    shares = [len(range(i, calibration.samples, len(names))) for i in range(len(names))]
    return [
        replace(calibration, source=name, samples=share)
        for name, share in zip(names, shares, strict=True)
    ]
