"""What compressing a model costs, counted from its config alone: FLOPs, bytes, time on a device.

Shapes: T calibration tokens in samples of L, K experts per token, H hidden, W width of one expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward, MlpExpert
from camera.streaming.memory import BATCH_TOKENS


@dataclass(frozen=True)
class Device:
    """What a machine does at most: FLOP/s of its matrix products, bytes/s of its memory, bytes/s
    at which weights come from where they are stored (and go back), FLOP/s in single precision."""

    flops: float
    memory: float
    link: float
    fp32: float


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer: FLOPs by part; bytes read and written once, and moved in memory.

    `everywhere` is what a run does without: gate and up of every expert on every token.
    """

    attention: int
    router: int
    gate_up: int
    down: int
    everywhere: int
    bytes_read: int
    bytes_written: int
    bytes_moved: int

    @property
    def flops(self) -> int:
        return self.attention + self.router + self.gate_up + self.down


@dataclass(frozen=True)
class RunCost:
    """A whole run: its layers, and the bytes of what stands outside them."""

    layers: list[LayerCost]
    bytes_rest: int
    parameters: int

    def total(self, part: str) -> int:
        """Sum over the layers of `flops`, `gate_up`, `bytes_read`, ..."""
        return sum(getattr(layer, part) for layer in self.layers)

    def seconds(self, device: Device, efficiency: float) -> float:
        """Each layer takes the longest of computing it, moving it through memory, reading the
        next and writing the last; compute and memory reach `efficiency` of what is possible."""
        each = (
            max(
                layer.flops / (device.flops * efficiency),
                layer.bytes_moved / (device.memory * efficiency),
                (layer.bytes_read + layer.bytes_written) / device.link,
            )
            for layer in self.layers
        )
        ends = self.layers[0].bytes_read + self.layers[-1].bytes_written + 2 * self.bytes_rest
        return sum(each) + ends / device.link


def run_cost(
    config: Any,
    tokens: int,
    length: int,
    *,
    sparsity: float,
    still_used: float | None = None,
    keep_phi: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> RunCost:
    """Cost of a one-pass compression (propagate=compressed) of a model of this config.

    Per layer, with T tokens: 2 T times the weights of every matrix outside the pool; attention
    2 T L heads (d_qk + d_v), not halved for its mask; of the pool 4 T K H W for gate and up and
    2 T K H W still_used for down, shared experts and dense FFNs with K = 1. Without `keep_phi`
    router, gate and up of what was kept run once more. `sparsity` is the share removed of the pool,
    `still_used` the kept share of the micro-experts that a token is routed to: 1 - sparsity (the
    default) if all experts are pruned alike; energy keeps more of experts that are used more.

    Bytes moved are the weights, once for each batch of tokens, and what every matrix product reads
    and writes. Source: the counts of the operations in camera/moe/capture.py and
    camera/streaming/streamer.py.
    """
    model, layers = _on_paper(config, dtype)
    shares = (sparsity, 1 - sparsity if still_used is None else still_used)
    costs = [
        _layer(
            config,
            layer,
            view,
            tokens,
            length,
            *(shares if pooled else (0.0, 1.0)),
            keep_phi,
            dtype,
        )
        for layer, view, pooled in layers
    ]
    size = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for layer, *_ in layers for p in layer.parameters())
    return RunCost(costs, (size - inside) * dtype.itemsize, size)


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
    """fp32 FLOPs of the refit of every layer: each of `ridges` and the last fit take `sweeps` over
    its experts, all experts pruned alike; with `attention` also its output weights (target=dense),
    which one sweep solves.

    Of an expert with N tokens and w kept micro-experts of W: 2 N (W - w) H for the removed output,
    2 N w^2 for its Gram matrix, of the tokens fitted to and of all; for each ridge w^3 / 3, and a
    sweep 2 N w H (1 - held_out) to read the residual, 2 w^2 H to solve, 2 N w H to change it.
    Source: the counts of the operations in camera/compensation/least_squares.py.
    """
    _, layers = _on_paper(config, torch.float32)
    hidden, seen, total = config.hidden_size, 1 - held_out, 0.0

    def fitted(used: int, width: int, kept: int, experts: int, sweeps: int) -> float:
        solve = 2 * experts * kept**2 * hidden
        tried = ridges * (2 * used * kept * hidden * (1 + seen) + solve)
        last = 4 * used * kept * hidden + solve
        grams = 2 * used * (width - kept) * hidden + 2 * used * kept**2 * (1 + seen)
        return grams + sweeps * (tried + last) + (ridges + 1) * experts * kept**3 / 3

    for layer, ffn, pooled in layers:
        for group in ffn.groups if pooled else ():
            used = tokens if isinstance(group, MlpExpert) else tokens * ffn.family.top_k(config)
            width = max(group.widths)
            kept = width - int(sparsity * width)
            total += fitted(used, width, kept, len(group.widths), sweeps)
        if attention:
            heads = layer.get_submodule(ffn.family.attention_output).in_features
            total += fitted(tokens, heads, heads, 1, 1)
    return int(total)


def _on_paper(
    config: Any, dtype: torch.dtype
) -> tuple[nn.Module, list[tuple[nn.Module, FeedForward, bool]]]:
    """A model without memory, and its layers, what is known of them, whether they have a pool."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    family, layers = family_of(config.model_type), model.base_model.layers
    root = f"{model.base_model_prefix}.layers"
    views = [FeedForward(layer, family, f"{root}.{i}") for i, layer in enumerate(layers)]
    in_pool = [view.is_moe or not any(v.is_moe for v in views) for view in views]
    return model, list(zip(layers, views, in_pool, strict=True))


def _layer(
    config: Any,
    layer: nn.Module,
    ffn: FeedForward,
    tokens: int,
    length: int,
    sparsity: float,
    still_used: float,
    keep_phi: bool,
    dtype: torch.dtype,
) -> LayerCost:
    again = 0 if keep_phi or not sparsity else 1
    pool = {id(p) for group in ffn.groups for p in group.module.parameters()}
    routers = [p for p in ffn.module.parameters() if p.dim() == 2 and id(p) not in pool]
    inside = pool | {id(p) for p in routers}
    outside = [p for p in layer.parameters() if p.dim() == 2 and id(p) not in inside]

    hidden = config.hidden_size
    gate_up, down, everywhere, moved = 0, 0, 0, 0
    for group in ffn.groups:
        used = tokens if isinstance(group, MlpExpert) else tokens * ffn.family.top_k(config)
        width = max(group.widths)
        gate_up += int(4 * used * hidden * width * (1 + again * still_used))
        everywhere += 4 * tokens * hidden * sum(group.widths)
        down += int(2 * used * hidden * width * still_used)
        # in and out of both products: x, then gate, up and phi (fp32), then the sum
        moved += used * (3 * hidden * dtype.itemsize + width * (3 * 4 + 2 * dtype.itemsize))
    attention = sum(2 * tokens * p.numel() for p in outside) + _scores(config, tokens, length)
    moved += sum(tokens * sum(p.shape) * dtype.itemsize for p in outside)
    weights = sum(p.numel() for p in layer.parameters()) * dtype.itemsize
    pooled = sum(p.numel() for group in ffn.groups for p in group.module.parameters())
    batches = -(-tokens // BATCH_TOKENS)
    return LayerCost(
        attention=attention,
        router=sum(2 * tokens * p.numel() for p in routers) * (1 + again),
        gate_up=gate_up,
        down=down,
        everywhere=everywhere,
        bytes_read=weights,
        bytes_written=weights - int(sparsity * pooled * dtype.itemsize),
        bytes_moved=moved + batches * weights,
    )


def _scores(config: Any, tokens: int, length: int) -> int:
    """Queries times keys, and probabilities times values."""
    each = family_of(config.model_type).attention_width(config)
    return 2 * tokens * length * config.num_attention_heads * each
