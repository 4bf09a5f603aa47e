"""Layers of a published model, with random weights, in every form that they are compressed to."""

from pathlib import Path
from typing import Any

import camera
from camera.checkpoint.loading import load_model
from camera.evaluation.speed import measure_speed
from camera.pipeline.result import CompressionResult
from experiments.bench.support.synthetic import write_model, write_text

MODEL, SPARSITY = "qwen3_30b_a3b", 0.25
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ragged": ("camera_p", dict(sparsity=SPARSITY)),
    "uniform": ("camera_p", dict(sparsity=SPARSITY, expert_widths="uniform")),
    "packed": ("camera_q", dict(bits=2.5, quantizer="rtn", group_size=32)),
}


def write_layers(folder: Path, layers: int, scale: int, length: int, model: str = MODEL) -> Path:
    """So many layers of a model, all widths divided by the scale."""
    source = folder / "model"
    write_model(source, model, layers=layers, scale=scale, length=length)
    return source


def compressed(
    source: Path, form: str, out: Path, device: str, samples: int, length: int
) -> CompressionResult:
    """The layers in a form, calibrated on random letters."""
    method, settings = FORMS[form]
    text = write_text(out.parent / f"{out.name}.txt", samples * length)
    return camera.compress(
        source,
        method,
        out,
        device=device,
        calibration=camera.Calibration(str(text), samples, length),
        progress=False,
        **settings,
    )


def speeds(source: Path, checkpoint: Path, device: str, **counts: Any) -> dict[str, Any]:
    """How fast a checkpoint reads and decodes beside the original, by batch size and phase."""
    dense, narrower = (load_model(folder, device, "bfloat16") for folder in (source, checkpoint))
    return measure_speed(dense, narrower, dense.config.vocab_size, **counts)["batches"]
