"""What compressing a model costs, counted from its config alone: FLOPs, bytes, time on a device.

Shapes: T calibration tokens in samples of L, K experts per token, H hidden, W width of one expert.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from camera.checkpoint.quantized.fp8 import STEP
from camera.compensation.least_squares import at_once
from camera.moe.experts.group import MlpExpert
from camera.moe.families import family_of
from camera.pipeline.memory.config_model import ConfigModel
from camera.streaming.memory import BATCH_TOKENS
from experiments.bench.support.cards import BANDWIDTH_SHARE, LAUNCH_SECONDS, WAIT_SECONDS, Card
from experiments.bench.support.traffic import LayerTraffic, Ways, layer_traffic

FP8 = 1 + 4 / 128**2  # bytes of a weight, with its share of a block's scale
UNPACKED = 23  # bytes moved for a weight in FP8: to fp32, its scale, their product, rounded
LAUNCHES_STEP = 5  # of unpacking so many weights as are in fp32 at a time


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer: FLOPs by part; bytes read and written once, and what is done beside.

    `everywhere` is what a run does without: gate and up of every expert on every token.
    """

    attention: int
    router: int
    gate_up: int
    down: int
    everywhere: int
    bytes_read: int
    bytes_written: int
    bytes_resume: int
    traffic: LayerTraffic

    @property
    def flops(self) -> int:
        return self.attention + self.router + self.gate_up + self.down


class Seconds(NamedTuple):
    """Where the time goes: products, elementwise kernels, waits; launches and copies as far as the
    computing doesn't hide them. `disk` is reading and writing, which goes on beside all of it."""

    products: float
    elementwise: float
    waits: float
    launches: float
    copies: float
    disk: float

    @property
    def total(self) -> float:
        """All but the disk."""
        return self.products + self.elementwise + self.waits + self.launches + self.copies


@dataclass(frozen=True)
class RunCost:
    """A whole run: its layers, and the bytes of what stands outside them."""

    layers: list[LayerCost]
    bytes_rest: int
    parameters: int

    def total(self, part: str) -> int:
        """Sum over the layers of `flops`, `gate_up`, `bytes_read`, ..."""
        return sum(getattr(layer, part) for layer in self.layers)

    def moved(self, part: str) -> int:
        """Sum over the layers of `elementwise`, `launches`, `waits`, ..."""
        return sum(getattr(layer.traffic, part) for layer in self.layers)

    def seconds(self, card: Card, efficiency: float, disk: float) -> Seconds:
        """Products reach `efficiency` of the card's peak, the disk so many bytes/s.

        A layer takes the longest of computing, launching what computes, and copies each way; the
        first layer's way in and the last one's way out are waited for.
        """
        products = elementwise = waits = launches = copies = 0.0
        for layer in self.layers:
            traffic = layer.traffic
            multiply = layer.flops / (card.flops * efficiency)
            move = traffic.elementwise / (card.bandwidth * BANDWIDTH_SHARE)
            ask = traffic.launches * LAUNCH_SECONDS
            up, down = layer.bytes_read + traffic.up, layer.bytes_written + traffic.down
            late = max(ask - multiply - move, 0.0)
            copies += max(max(up, down) / card.link - multiply - move - late, 0.0)
            products, elementwise, launches = (
                products + multiply,
                elementwise + move,
                launches + late,
            )
            waits += traffic.waits * WAIT_SECONDS
        ends = self.layers[0].bytes_read + self.layers[-1].bytes_written + 2 * self.bytes_rest
        stored = self.total("bytes_read") + self.total("bytes_written") + 2 * self.bytes_rest
        stored += self.total("bytes_resume")
        return Seconds(
            products, elementwise, waits, launches, copies + ends / card.link, stored / disk
        )


def run_cost(
    config: Any,
    tokens: int,
    length: int,
    *,
    sparsity: float,
    still_used: float | None = None,
    ways: Ways = Ways(),  # noqa: B008 (frozen)
    batch: int = BATCH_TOKENS,
    dtype: torch.dtype = torch.bfloat16,
) -> RunCost:
    """Cost of a one-pass compression (propagate=compressed) of a model of this config.

    Per layer, with T tokens: 2 T times the weights of every matrix outside the pool; attention
    2 T L heads (d_qk + d_v), not halved for its mask; of the pool 4 T K H W for gate and up and
    2 T K H W still_used for down, shared experts and dense FFNs with K = 1. Where phi isn't
    kept, gate and up of the micro-experts that stay run once more; where none is, the router too.
    `sparsity` is the share removed of the pool, `still_used` the kept share of the micro-experts
    that a token is routed to: 1 - sparsity (the default) if all experts are pruned alike; energy
    keeps more of experts that are used more.

    `batch` tokens run at once, in these `ways`: hidden states stay on the device, or cross to the
    host and back; routed experts on disk are read twice, to observe and to prune. What is stored in
    FP8 is read as such, and unpacked on the device.
    """
    paper = ConfigModel(config, dtype)
    used = 1 - sparsity if still_used is None else still_used
    costs = [
        _layer(
            paper, i, tokens, length, sparsity, used, ways=ways, batch=batch,
        )
        for i in range(len(paper.layers))
    ]  # fmt: skip
    size = sum(p.numel() for p in paper.model.parameters())
    inside = sum(p.numel() for p in paper.layers.parameters())
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


def _layer(
    paper: ConfigModel,
    index: int,
    tokens: int,
    length: int,
    sparsity: float,
    still_used: float,
    *,
    ways: Ways,
    batch: int,
) -> LayerCost:
    config, layer, ffn = paper.config, paper.layers[index], paper.feed_forward(index)
    in_pool, size, hidden = index in paper.budget.layers, paper.dtype.itemsize, config.hidden_size
    if not in_pool:
        sparsity, still_used = 0.0, 1.0
    phi = ways.phi if sparsity else "all"
    pool = {id(p) for group in ffn.groups for p in group.module.parameters()}
    routers = [p for p in ffn.module.parameters() if p.dim() == 2 and id(p) not in pool]
    inside = pool | {id(p) for p in routers}
    outside = [p for p in layer.parameters() if p.dim() == 2 and id(p) not in inside]

    gate_up, down, everywhere = 0, 0, 0
    for group in ffn.groups:
        used = tokens if isinstance(group, MlpExpert) else tokens * ffn.family.top_k(config)
        width = max(group.widths)
        again = phi == "none" or (phi == "routed" and isinstance(group, MlpExpert))
        gate_up += int(4 * used * hidden * width * (1 + again * still_used))
        everywhere += 4 * tokens * hidden * sum(group.widths)
        down += int(2 * used * hidden * width * still_used)
    weights = sum(p.numel() for p in layer.parameters()) * size
    pooled = sum(p.numel() for group in ffn.groups for p in group.module.parameters())
    twice = list(ffn.routed.module.parameters()) if ways.experts_on_disk and ffn.routed else []
    read = [*layer.parameters(), *twice]
    packed = [p.numel() for p in read if p.dim() > 1] if _is_fp8(config) else []
    traffic = layer_traffic(
        layer,
        ffn,
        tokens,
        -(-tokens // batch),
        ways,
        hidden=hidden,
        top_k=ffn.family.top_k(config),
        kept=1 - sparsity,
        still_used=still_used,
        size=size,
        in_pool=in_pool,
    )
    return LayerCost(
        attention=sum(2 * tokens * p.numel() for p in outside) + _scores(config, tokens, length),
        router=sum(2 * tokens * p.numel() for p in routers) * (1 + (phi == "none")),
        gate_up=gate_up,
        down=down,
        everywhere=everywhere,
        bytes_read=sum(p.numel() for p in read) * size - int(sum(packed) * (size - FP8)),
        bytes_written=weights - int(sparsity * pooled * size),
        bytes_resume=tokens * hidden * size,
        traffic=replace(
            traffic,
            elementwise=traffic.elementwise + UNPACKED * sum(packed),
            launches=traffic.launches + LAUNCHES_STEP * sum(-(-n // STEP) for n in packed),
        ),
    )


def _is_fp8(config: Any) -> bool:
    return (getattr(config, "quantization_config", None) or {}).get("quant_method") == "fp8"


def _scores(config: Any, tokens: int, length: int) -> int:
    """Queries times keys, and probabilities times values."""
    each = family_of(config.model_type).attention_width(config)
    return 2 * tokens * length * config.num_attention_heads * each
