"""Quantise a model to 2.5 stored bits per weight: more bits where the energy is."""

from _common import CALIBRATION, DATA, MODEL, OUT
from transformers import AutoModelForCausalLM

import camera

result = camera.compress(
    MODEL, "camera_q", OUT / "packed", bits=2.5, calibration=CALIBRATION, data=DATA
)
# `stored` counts scales and zeros, `model` every weight of the model, packed or not.
print({name: round(bits, 2) for name, bits in result.bits.items()})
print(f"{result.bytes['dense'] / 1e6:.1f} MB -> {result.bytes['compressed'] / 1e6:.1f} MB")

model = AutoModelForCausalLM.from_pretrained(OUT / "packed")  # unpacks in each call
camera.dequantize(model)  # once for all: larger in memory, the same outputs
print(f"{model.num_parameters():,} parameters unpacked")
