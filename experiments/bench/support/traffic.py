"""What Camera-P does to a layer beside its matrix products: bytes, launches, waits, copies.

Every operator reads its inputs and writes its outputs: a number in the model's precision is b
bytes, one in fp32 four. What attention does inside (scores, softmax) stays on the chip.
tests/experiments/bench/test_traffic.py holds all of it against runs on the fake device.

Shapes: T tokens, H hidden, K experts per token, S = T * K slots, E experts, W width of one expert.
"""

from dataclasses import dataclass

from torch import nn

from camera.moe.feed_forward import FeedForward, MlpExpert
from camera.moe.pool import PoolIndex

NUMBER = 8  # bytes of a row's or a token's number
ENERGY = 12  # bytes of a micro-expert's energy: sum, maximum, basis
# Launches: per expert and batch, per expert, per batch, per layer; a shared expert as one of them.
LAUNCHES = {True: (17.5, 1.2, 67, 115), False: (17.4, 0.2, 88, 94)}  # by whether phi is kept
WAITS_LAYER = 8
NORM = 36  # bytes a number of bf16: to fp32, squared, averaged, divided, back, times its weight
ROTARY = 28  # of queries and keys: turned, multiplied twice, added, put in order
JOINED = 4  # of a query or a key: read and written
LOADED = 61.5 / 3  # a routed weight: joined to its table, looked through twice, cut, its norm
LOADED_ALONE = 25 / 3  # any other


@dataclass(frozen=True)
class LayerTraffic:
    """One decoder layer: bytes that elementwise kernels move, bytes to the device and back beside
    the weights, operators that are launched, and how often the host waits."""

    elementwise: int
    up: int
    down: int
    launches: int
    waits: int


def layer_traffic(
    layer: nn.Module,
    ffn: FeedForward,
    tokens: int,
    batches: int,
    *,
    hidden: int,
    top_k: int,
    kept: float,
    still_used: float,
    keep_phi: bool,
    on_device: bool,
    size: int,
    in_pool: bool = True,
) -> LayerTraffic:
    """What a layer takes, observed and pruned if it is of the pool.

    `kept` is the share of the pool that stays, `still_used` that of the micro-experts that a token
    is routed to, `size` the bytes of a number.
    Where hidden states don't stay `on_device`, three tables cross each way: the layer's inputs, its
    FFN's inputs (twice without phi) and the residuals; in the end one for resuming in any case.
    """
    table = tokens * hidden * size
    keep_phi = keep_phi and in_pool
    moved = float(_layer(layer, tokens, hidden))
    for group in ffn.groups:
        shared = isinstance(group, MlpExpert)
        used, width = tokens * (1 if shared else top_k), max(group.widths)
        weighted = not shared or group.gate is not None
        if in_pool:
            moved += used * width * _observed(size, weighted, keep_phi)
        moved += used * width * still_used * (2 * size if keep_phi else 5 * size)
        if not shared:
            moved += used * hidden * (9 if keep_phi else 12) * size
        elif ffn.is_moe and not keep_phi:
            moved += used * hidden * (6 if group.gate is not None else 3) * size
    moved += 21 * tokens * hidden
    if ffn.is_moe:
        experts = len(ffn.groups[-1].widths)
        router = tokens * (18 * experts + 30 * top_k)
        moved += router if keep_phi else 2 * router
    routed = sum(p.numel() for p in ffn.routed.module.parameters()) if ffn.routed else 0
    everything = sum(p.numel() for p in layer.parameters())
    moved += (LOADED * routed + LOADED_ALONE * (everything - routed)) * size / 2
    pool = PoolIndex(ffn)
    numbers = int(NUMBER * kept * pool.micro_experts)
    each, expert, batch, whole = LAUNCHES[keep_phi]
    launches = (each * batches + expert) * pool.experts + batch * batches + whole
    return LayerTraffic(
        elementwise=int(moved),
        up=numbers * (1 + keep_phi) + (0 if on_device else (4 - keep_phi) * table),
        down=ENERGY * pool.micro_experts + table + (0 if on_device else 2 * table),
        launches=int(launches),
        waits=WAITS_LAYER + batches * (1 if keep_phi else 2),
    )


def _observed(size: int, weighted: bool, keep_phi: bool) -> int:
    """Bytes per token and micro-expert: activation, product, weight, squares, sums and maxima."""
    activation = 2 * (size + 4) + 8 + 12
    energies = 8 * weighted + 8 + 4 + 4
    return activation + energies + keep_phi * (8 * weighted + 4 + size)


def _layer(layer: nn.Module, tokens: int, hidden: int) -> int:
    """Norms, rotary positions and residuals."""
    parts = dict(layer.named_modules())
    turned = [
        module.out_features
        for name, module in parts.items()
        if name.endswith(("q_proj", "k_proj")) and isinstance(module, nn.Linear)
    ]
    normed = any(name.endswith("q_norm") for name in parts)
    moved = 2 * (NORM + 6) * hidden + (ROTARY + NORM * normed) * sum(turned)
    return tokens * (moved + sum(_latent(module) for module in parts.values()))


def _latent(module: nn.Module) -> int:
    """Bytes a token of latent attention beside products: norms of the latent vectors, the turned
    part of queries and of the one key, and queries and keys put together."""
    if not hasattr(module, "kv_b_proj"):
        return 0
    latent = module.kv_lora_rank + (module.q_lora_rank or 0)
    turned = (module.num_heads + 1) * module.qk_rope_head_dim
    return NORM * latent + ROTARY * turned + 2 * JOINED * module.num_heads * module.qk_head_dim
