"""What Camera-P does to a layer beside its matrix products: bytes, launches, waits, copies.

Every operator reads its inputs and writes its outputs: a number in the model's precision is b
bytes, one in fp32 four. What attention does inside (scores, softmax) stays on the chip.
tests/experiments/bench/test_traffic.py holds all of it against runs on the fake device.

Shapes: T tokens, H hidden, K experts per token, S = T * K slots, E experts, W width of one expert.
"""

from dataclasses import dataclass

from torch import nn

from camera.moe.experts.group import ExpertGroup, MlpExpert
from camera.moe.feed_forward import FeedForward
from camera.moe.grouped.rows import BLOCK
from camera.moe.pool import PoolIndex
from camera.pipeline.memory.estimate import PhiKept

NUMBER = 8  # bytes of a row's or a token's number
ENERGY = 12  # bytes of a micro-expert's energy: sum, maximum, basis
# Launches for each expert and batch, by what is kept of phi: its products, and a choice of columns;
# none where products of all experts are one kernel.
EACH = {"all": 3, "routed": 3, "none": 5}
EACH_ALONE = 17.5  # of one that is computed by itself
# For each expert: norms and cut; and a table with zeros for these.
EXPERT, WHOLE_DOWN = 8, 4
# For each batch: attention and sums, norms of queries and keys, an MLP and its gate, routed experts
# however many, and what runs again; and for each layer.
BATCH, NORMED, MLP, GATE, ROUTED = 60, 12, 27, 10, 85
AGAIN = {"all": 0, "routed": 5, "none": 16}
LAYER, OUTSIDE_POOL = 90, 40
WAITS_LAYER = 9
NORM = 36  # bytes a number of bf16: to fp32, squared, averaged, divided, back, times its weight
ROTARY = 28  # of queries and keys: turned, multiplied twice, added, put in order
JOINED = 4  # of a query or a key: read and written
LOADED = 61.5 / 3  # a routed weight: joined to its table, looked through twice, cut, its norm
LOADED_ALONE = 25 / 3  # any other
ROUTED_SLOT = 200  # bytes to put a slot where its expert's rows are: sorted, numbered, weighed
BLOCKS = 2.0  # per token and micro-expert, of what was summed up in blocks


@dataclass(frozen=True)
class LayerTraffic:
    """One decoder layer: bytes that elementwise kernels move, bytes to the device and back beside
    the weights, operators that are launched, and how often the host waits."""

    elementwise: int
    up: int
    down: int
    launches: int
    waits: int


@dataclass(frozen=True)
class Ways:
    """How a layer is computed: what is kept of phi, whether hidden states stay on the device and
    routed experts on disk, whether there is a compiler for phi, its squares and the products of all
    experts, and whether torch has a kernel of its own for these."""

    phi: PhiKept = "all"
    on_device: bool = True
    experts_on_disk: bool = False
    compiled: bool = True
    grouped: bool = False

    @property
    def one_launch(self) -> bool:
        """Whether products of all experts are one kernel, however many they are."""
        return self.grouped or self.compiled

    def together(self, group: ExpertGroup) -> bool:
        """Whether all experts of a group are computed at once."""
        return group.goes_together and not (group.routed and self.experts_on_disk)


def layer_traffic(
    layer: nn.Module,
    ffn: FeedForward,
    tokens: int,
    batches: int,
    ways: Ways,
    *,
    hidden: int,
    top_k: int,
    kept: float,
    still_used: float,
    size: int,
    in_pool: bool = True,
) -> LayerTraffic:
    """What a layer takes, observed and pruned if it is of the pool.

    `kept` is the share of the pool that stays, `still_used` that of the micro-experts that a token
    is routed to, `size` the bytes of a number.
    Where hidden states don't stay on the device, three tables cross each way: the layer's inputs,
    its FFN's inputs (twice where any phi is computed again) and the residuals; in the end one for
    resuming in any case.
    """
    table = tokens * hidden * size
    phi = ways.phi if in_pool else "none"
    again = phi != "all"
    moved = float(_layer(layer, tokens, hidden))
    for group in ffn.groups:
        shared = isinstance(group, MlpExpert)
        used, width = tokens * (1 if shared else top_k), max(group.widths)
        keeps = phi == "all" or (phi == "routed" and not shared)
        if in_pool:
            together = ways.together(group)
            filling = 0 if shared or not together else batches * len(group.widths) * BLOCK // 2
            rows, weighted = used + filling, not shared or group.gate is not None
            moved += rows * width * _observed(size, weighted, keeps, ways.compiled and together)
            moved += 0 if shared else 2 * size * hidden * (tokens + rows) + ROUTED_SLOT * used
        moved += used * width * still_used * (2 * size if keeps else 5 * size)
        if not shared:
            moved += used * hidden * size if keeps else 12 * used * hidden * size
            moved += 5 * table if keeps else 0
        elif ffn.is_moe:
            gated = 3 if group.gate is not None and not keeps else 0
            moved += (3 + gated) * table
    moved += 21 * tokens * hidden
    if ffn.is_moe:
        experts = len(ffn.groups[-1].widths)
        router = tokens * (18 * experts + 30 * top_k)
        moved += 2 * router if phi == "none" else router
    routed = sum(p.numel() for p in ffn.routed.module.parameters()) if ffn.routed else 0
    everything = sum(p.numel() for p in layer.parameters())
    moved += (LOADED * routed + LOADED_ALONE * (everything - routed)) * size / 2
    pool = PoolIndex(ffn)
    numbers = int(NUMBER * kept * pool.micro_experts)
    launches = _launches(layer, ffn, batches, ways, phi, in_pool)
    return LayerTraffic(
        elementwise=int(moved),
        up=numbers * (2 - (phi == "none")) + (0 if ways.on_device else (3 + again) * table),
        down=ENERGY * pool.micro_experts + table + (0 if ways.on_device else 2 * table),
        launches=launches,
        waits=WAITS_LAYER + batches * (1 + (phi == "none")),
    )


def _launches(
    layer: nn.Module, ffn: FeedForward, batches: int, ways: Ways, phi: PhiKept, in_pool: bool
) -> int:
    normed = NORMED * any(name.endswith("q_norm") for name, _ in layer.named_modules())
    if not in_pool:
        return (BATCH + normed + GATE) * batches + OUTSIDE_POOL
    mlps = [group for group in ffn.groups if isinstance(group, MlpExpert)]
    gates = sum(group.gate is not None for group in mlps)
    batch = BATCH + normed + MLP * len(mlps) + GATE * gates + ROUTED * ffn.is_moe + AGAIN[phi]
    launches = batch * batches + LAYER
    for group in ffn.groups:
        each, expert = (0, EXPERT + WHOLE_DOWN) if ways.one_launch else (EACH[phi], EXPERT)
        if not ways.together(group):
            each, expert = EACH_ALONE, EXPERT
        launches += int((each * batches + expert) * len(group.widths))
    return launches


def _observed(size: int, weighted: bool, keeps: bool, compiled: bool) -> float:
    """Bytes per token and micro-expert: phi, its squares in blocks, and the squares of a row.

    Compiled it is two kernels, as sums go along both: each reads gate and up once.
    """
    if compiled:
        return 4 * size + keeps * size + BLOCKS
    activation = 2 * (size + 4) + 8 + 12
    energies = 8 + 4 + 8 * weighted + 8 + 4 + 4
    return activation + energies + keeps * (4 + size) + BLOCKS


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
