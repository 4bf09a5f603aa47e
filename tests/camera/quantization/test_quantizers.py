"""Quantisers by name, what they store beside codes, and a layer quantised by another grid.

Shapes: E experts, R rows, C columns.
"""

import pytest
import torch

from camera.calibration.hessians import HessianObserver
from camera.checkpoint.formats.packed.codes import MAX_BITS
from camera.checkpoint.formats.packed.footprint import StoredBits
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.quantization.layer import quantize_layer
from camera.quantization.plans.layer_bits import ExpertBits
from camera.quantization.quantizers.gptq import GPTQ
from camera.quantization.quantizers.nearest import RoundToNearest
from camera.quantization.quantizers.quantizer import QUANTIZERS
from camera.runtime.errors import CameraError
from tests.helpers.models import build_model


def test_quantizers_are_found_by_name():
    assert {"gptq", "rtn"} <= set(QUANTIZERS)
    assert QUANTIZERS["gptq"] is GPTQ and QUANTIZERS["rtn"] is RoundToNearest
    assert GPTQ.needs_hessian and not RoundToNearest.needs_hessian
    with pytest.raises(CameraError, match=r"method\.quantizer=gptp.*Did you mean gptq"):
        QUANTIZERS["gptp"]


@pytest.mark.parametrize("sym", [False, True])
def test_round_to_nearest_is_gptq_without_a_hessian(sym):
    torch.manual_seed(0)
    W_ERC = torch.randn(2, 6, 20)
    settings = dict(group_size=8, sym=sym, scale_dtype=torch.float16)
    for bits in (dict(bits=3), dict(column_bits=torch.tensor([3] * 10 + [1] * 10))):
        nearest = RoundToNearest(**settings)
        assert nearest.factor(torch.eye(20)[None]) is None
        got, want = nearest.solve(W_ERC, **bits), GPTQ(**settings).solve(W_ERC, **bits)
        assert torch.equal(got.codes_ERC, want.codes_ERC)
        assert torch.equal(got.weight, want.weight)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_stored_bits_of_a_quantizer_are_those_of_its_settings(act_order, static_groups, sym):
    quantizer = GPTQ(16, sym, act_order, static_groups)
    scattered = act_order and not static_groups
    assert quantizer.scattered is scattered
    bits_N = torch.arange(30) % (MAX_BITS + 1)
    got = StoredBits.of(quantizer, 32, [10, 20])
    want = StoredBits(32, (10, 20), 16, sym, scattered)
    assert got.total(bits_N) == want.total(bits_N)


@pytest.mark.parametrize("seen", [False, True])
def test_a_layer_takes_any_quantizer(seen):
    """Round-to-nearest gives the same layer with and without Hessians: GPTQ's without."""
    packed = []
    for quantizer, hessians in ((RoundToNearest(8), seen), (GPTQ(8), False)):
        model = build_model("qwen2_moe")
        ffn = FeedForward(model.model.layers[0], family_of("qwen2_moe"), "model.layers.0")
        statistics = HessianObserver(ffn).result() if hessians else None
        plan = [ExpertBits.matched(torch.full((width,), 3)) for width in ffn.widths]
        quantize_layer(ffn, plan, quantizer, statistics)
        packed.append(ffn.module.state_dict())
    assert packed[0].keys() == packed[1].keys()
    assert all(torch.equal(tensor, packed[1][name]) for name, tensor in packed[0].items())
