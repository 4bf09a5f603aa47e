"""Camera: compress Mixture-of-Experts language models by their micro-experts.

Importing this package teaches transformers the checkpoint format `camera` and the model type
`deepseek`.
"""

from camera import checkpoint, deepseek
from camera.api import compress, describe
from camera.calibration import Calibration
from camera.dagger import CameraQDagger
from camera.dequantize import dequantize
from camera.errors import CameraError
from camera.native import export
from camera.plus import CameraPlus
from camera.prune import CameraP, Dense, Random
from camera.quantize import CameraQ
from camera.result import CompressionResult

deepseek.register()

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "CameraError",
    "CameraP",
    "CameraPlus",
    "CameraQ",
    "CameraQDagger",
    "CompressionResult",
    "Dense",
    "Random",
    "checkpoint",
    "compress",
    "dequantize",
    "describe",
    "export",
]
