"""Camera: compress Mixture-of-Experts language models by their micro-experts.

Importing this package teaches transformers the checkpoint format `camera` and the model type
`deepseek`, without loading it.
"""

from importlib import import_module
from typing import Any

from camera.checkpoint.registration import register_with_transformers

register_with_transformers()

__version__ = "0.1.0"
# Raised by every change that gives any method, measure or task another result (beyond rounding):
# runs of before are then done again and never compared with those of after.
# tests/integration/test_mathematics.py holds what the methods make of tiny models by this number.
MATHEMATICS = 2
_MODULES = {
    "Calibration": "camera.calibration.settings",
    "CameraError": "camera.runtime.errors",
    "CameraP": "camera.pruning.camera_p",
    "CameraPlus": "camera.pruning.camera_plus",
    "CameraQ": "camera.quantization.camera_q",
    "CameraQDagger": "camera.quantization.camera_q_dagger",
    "CompressionResult": "camera.pipeline.result",
    "LayerwiseBits": "camera.quantization.layerwise.bits",
    "MemoryChoices": "camera.streaming.settings",
    "Plan": "camera.method",
    "apply": "camera.api",
    "compress": "camera.api",
    "dequantize": "camera.checkpoint.modules",
    "describe": "camera.api",
    "description": "camera.inspection",
    "evaluate": "camera.evaluation.evaluate",
    "export": "camera.engines.export",
    "imatrix": "camera.engines.gguf.imatrix",
    "load": "camera.checkpoint.loading",
    "tensor_types": "camera.engines.gguf.tensor_types",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    """A public name, from the module that has it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'camera' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
