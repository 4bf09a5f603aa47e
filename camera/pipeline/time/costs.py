"""What compressing a model costs, counted from its config alone: FLOPs, bytes, time on a device.

Shapes: T calibration tokens in samples of L, K experts per token, H hidden, W width of one expert.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from camera.checkpoint.quantized.fp8 import STEP
from camera.moe.experts.group import MlpExpert
from camera.pipeline.memory.config_model import ConfigModel
from camera.pipeline.memory.estimate import MemoryEstimate
from camera.pipeline.time.cards import BANDWIDTH_SHARE, LAUNCH_SECONDS, WAIT_SECONDS, Card
from camera.pipeline.time.traffic import LayerTraffic, Ways, layer_traffic
from camera.streaming.memory import BATCH_TOKENS

FP8 = 1 + 4 / 128**2  # bytes of a weight, with its share of a block's scale
UNPACKED = 23  # bytes moved for a weight in FP8: to fp32, its scale, their product, rounded
EFFICIENCY, DISK = 0.4, 3e9  # of the card's peak; bytes/s, read and written: where none are given
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


def ways_on(card: Card, said: MemoryEstimate) -> Ways:
    """How a run computes on a card, or a CPU (of 0 bytes), whose estimate of memory said this."""
    return Ways(
        phi=said.phi_kept,
        on_device=not card.bytes or said.hidden_place == "device",
        experts_on_disk=said.experts_on_disk,
        compiled=bool(card.bytes),
        grouped=card.grouped,
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
    in_pool, size, hidden = index in paper.budget.layers, paper.dtype.itemsize, paper.budget.hidden
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
        attention=sum(2 * tokens * p.numel() for p in outside) + _scores(paper, tokens, length),
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


def _scores(paper: ConfigModel, tokens: int, length: int) -> int:
    """Queries times keys, and probabilities times values."""
    each = paper.family.attention_width(paper.text_config)
    return 2 * tokens * length * paper.text_config.num_attention_heads * each
