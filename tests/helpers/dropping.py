"""Tiny models whose experts may be dropped, seen layer by layer; grouped routers among them."""

import torch

from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from tests.helpers.models import MOE_FAMILIES, build_model

# deepseek_v3 needs two experts a group: the tiny model has no more; here it has four
CASES = {name: {} for name in MOE_FAMILIES}
CASES["deepseek_v3"] = dict(n_routed_experts=16, n_group=4, topk_group=2)
GROUPED_V2 = dict(topk_method="group_limited_greedy", n_group=2, topk_group=1)


def family_and_overrides(case):
    if case == "deepseek_v2 in groups":
        return "deepseek_v2", GROUPED_V2
    return case, CASES.get(case, {})


def build(case, **more):
    family, overrides = family_and_overrides(case)
    model = build_model(family, **overrides, **more)
    for layer in model.model.layers:
        ffn = getattr(layer, family_of(family).ffn)
        bias = getattr(getattr(ffn, "gate", None), "e_score_correction_bias", None)
        if bias is not None:
            bias.copy_(torch.linspace(-0.05, 0.05, len(bias)).roll(3))
    return model


def views(model):
    """The MoE layers of a model, as methods see them."""
    family = family_of(model.config.model_type)
    layers = enumerate(model.model.layers)
    found = {i: FeedForward(layer, family, f"model.layers.{i}") for i, layer in layers}
    return {i: ffn for i, ffn in found.items() if ffn.is_moe}


def some(routing, seed=0):
    """Experts to keep, drawn: the fewest the router can do with, equally many of each group."""
    draw = torch.Generator().manual_seed(seed)
    size, gone = routing.experts // routing.groups, routing.most // routing.groups
    kept = [
        g * size + torch.randperm(size, generator=draw)[: size - gone]
        for g in range(routing.groups)
    ]
    return torch.cat(kept).sort().values.tolist()


def tokens():
    return torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))


ALL = [*CASES, "deepseek_v2 in groups"]


def candidates(keeps, experts):
    """Which experts stay, [C, E], for each set of those that do."""
    keep_CE = torch.zeros(len(keeps), experts, dtype=torch.bool)
    for row, keep in zip(keep_CE, keeps, strict=True):
        row[list(keep)] = True
    return keep_CE
