"""What a refit costs, counted from a model's config.

Shapes: T calibration tokens, H hidden, W width of one expert.
"""

from typing import Any

import torch

from camera.compensation.least_squares import at_once
from camera.moe.experts.group import MlpExpert
from camera.pipeline.memory.config_model import ConfigModel


def fit_flops(
    config: Any,
    tokens: int,
    *,
    sparsity: float,
    ridges: int,
    sweeps: int,
    held_out: float,
    attention: bool = False,
) -> int:
    """fp32 FLOPs of the refit of every layer, all experts pruned alike; with `attention` also its
    output weights (target=dense).

    Where K micro-experts in all are solved at once: 2 T K (K + H) for the sums over T tokens; for
    each ridge and the last fit K^3 / 3 and 2 K^2 H to solve, for each ridge 2 K^2 H to judge;
    2 N w H to change the residual of N tokens. Else each of `ridges` and the last fit take `sweeps`
    over the experts. Of an expert with N tokens and w kept micro-experts: 2 N w^2 for its Gram
    matrix, of the tokens fitted to and of all; for each ridge w^3 / 3, and a sweep
    2 N w H (1 - held_out) to read the residual, 2 w^2 H to solve, 2 N w H to change it.
    Either way 2 N (W - w) H for the output that was removed.
    Source: the counts of the operations in camera/compensation.
    """
    paper = ConfigModel(config, torch.float32)
    hidden, seen, total = config.hidden_size, 1 - held_out, 0.0

    def solved(used: int, kept: int) -> float:
        """At once: of `kept` in all, of which each of `used` tokens of experts moves its own."""
        tried = (ridges + 1) * (kept**3 / 3 + 2 * kept**2 * hidden) + ridges * 2 * kept**2 * hidden
        return 2 * tokens * kept * (kept + hidden) + 2 * used * hidden + tried

    def descended(used: int, kept: int, experts: int) -> float:
        solve = 2 * experts * kept**2 * hidden
        tried = ridges * (2 * used * kept * hidden * (1 + seen) + solve)
        last = 4 * used * kept * hidden + solve
        grams = 2 * used * kept**2 * (1 + seen)
        return grams + sweeps * (tried + last) + (ridges + 1) * experts * kept**3 / 3

    for i, layer in enumerate(paper.layers):
        ffn = paper.feed_forward(i)
        found = []  # tokens, width, kept width and number of each group's experts
        for group in ffn.groups if i in paper.budget.layers else ():
            used = tokens if isinstance(group, MlpExpert) else tokens * ffn.family.top_k(config)
            width = max(group.widths)
            found.append((used, width, width - int(sparsity * width), len(group.widths)))
        total += sum(2 * used * (width - kept) * hidden for used, width, kept, _ in found)
        widths = [kept for _, _, kept, experts in found for _ in range(experts)]
        if widths and at_once(widths):
            total += solved(sum(used * kept for used, _, kept, _ in found), sum(widths))
        else:
            total += sum(descended(used, kept, experts) for used, _, kept, experts in found)
        if attention:
            heads = layer.get_submodule(ffn.family.attention_output).in_features
            total += solved(tokens * heads, heads)
    return int(total)
