"""What the examples are run on: the embedded model, or MODEL and DATA of the command line."""

import sys
import tempfile
from pathlib import Path

import camera
from experiments.config.location import EMBEDDED_MODEL
from experiments.tiny_moe.layout import ensure_world

MODEL = sys.argv[1] if len(sys.argv) > 1 else EMBEDDED_MODEL
DATA = sys.argv[2] if len(sys.argv) > 2 else ensure_world(Path("outputs/data"))
OUT = Path(tempfile.mkdtemp(prefix="camera-"))  # a folder of yours: compress never overwrites
# The papers take 128 samples of 2048 tokens.
CALIBRATION = camera.Calibration("wikitext2", samples=16, length=128)
