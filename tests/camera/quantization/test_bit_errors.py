"""Energy lost at each bit width, measured before bits are assigned."""

import torch

from camera.quantization.layer import quantize_layer
from camera.quantization.plans.layer_bits import ExpertBits
from camera.quantization.quantizers.bit_errors import bit_errors
from camera.quantization.quantizers.gptq import GPTQ
from tests.helpers.quantization.quantizing import dense_output, layer_of, seen_by


def test_bit_errors_predict_what_is_lost():
    """Measured shares fall with bits, and are what a layer of those bits really loses."""
    levels = (4, 3, 2, 1, 0)
    ffn, x_TH = layer_of("llama")
    seen, before = seen_by(ffn, x_TH), dense_output(ffn, x_TH)
    solver = GPTQ(group_size=16)
    errors = bit_errors(ffn, seen, solver, levels)
    assert errors[0] == 1 and all(errors[b] < errors[b - 1] for b in levels[:-1])
    for bits in (4, 3):
        ffn, _ = layer_of("llama")
        quantize_layer(ffn, [ExpertBits.matched(torch.full((64,), bits))], solver, seen)
        lost = (dense_output(ffn, x_TH) - before).square().sum() / before.square().sum()
        assert 0.5 * errors[bits] < lost < 2 * errors[bits]
