"""A layer to quantise, what is seen of it, and its plan.

Shapes: T tokens, H hidden.
"""

import torch

from camera.calibration.hessians import HessianObserver, HessianStatistics
from camera.moe.budget import Budget, Count
from camera.moe.capture import run_ffn, unwrap
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.pool import LayerPool
from camera.quantization.plans.layer_bits import LayerBits
from tests.helpers.models import build_model
from tests.helpers.oracles import capture


def layer_of(family: str, index: int = 1, **overrides):
    """A layer's FFN, and inputs of it with the norm's scale."""
    model = build_model(family, **overrides).requires_grad_(False)
    ids = torch.randint(3, 250, (4, 64), generator=torch.Generator().manual_seed(0))
    x_TH, _ = capture(model, index, ids)
    ffn = FeedForward(model.model.layers[index], family_of(family), f"model.layers.{index}")
    return ffn, x_TH


def seen_by(ffn, x_TH, **settings) -> HessianStatistics:
    """Hessians of the layer, over these tokens."""
    observer = HessianObserver(ffn, **settings)
    with torch.no_grad():
        run_ffn(ffn, x_TH[None], observer)
    return observer.result()


def budget_of(ffn, index: int = 1) -> Budget:
    """The budget of a model of this one layer."""
    routed = [group.routed for group in ffn.groups for _ in group.widths]
    weights = 3 * 32 * sum(ffn.widths)
    pools = {index: LayerPool(list(ffn.widths), routed)}
    hidden = ffn.groups[0].down(0).shape[0]
    return Budget(Count(weights, weights, 0, 2 * weights), pools, "test", hidden)


def plan_of(method, ffn, seen, index: int = 1) -> LayerBits:
    """What a method plans for the layer, alone."""
    budget = budget_of(ffn, index)
    return method.plan_layer(index, ffn, seen, budget, method.plan({}, budget))


def dense_output(ffn, x_TH) -> torch.Tensor:
    """What the layer's module puts out."""
    with torch.no_grad():
        return unwrap(ffn.module(x_TH[None]))
