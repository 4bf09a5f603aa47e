"""The facts of one compression, as they stand in `camera.json` and later in `metrics.json`."""

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any


@dataclass
class CompressionResult:
    """What compressing a model did; bytes are those of the weight files."""

    method: str
    model: str
    settings: dict[str, Any]
    sparsity: dict[str, Any]  # asked, of, and realised: moe, model, routed
    bits: dict[str, float]  # per weight: raw, stored with metadata, average of the whole model
    bytes: dict[str, int]  # dense, compressed
    seconds: dict[str, float] = field(default_factory=dict)  # calibrate, compress
    peak_memory_bytes: int = 0  # of the process (on an accelerator: of its memory)
    expected_memory_bytes: int = 0  # the same, as estimated when it began
    coverage: dict[str, Any] = field(default_factory=dict)
    widths: dict[str, list[int]] = field(default_factory=dict)  # kept, by module path
    full_widths: dict[str, int] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # what the method says of each
    statistics: str | None = None  # file name inside the checkpoint
    versions: dict[str, str] = field(default_factory=dict)
    checkpoint: str | None = None
    native: bool = False  # loads in transformers without this package

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("camera-moe", "torch", "transformers", "safetensors")}
