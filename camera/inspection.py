"""What a model is made of, and what methods would leave of it, by its config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from camera.checkpoint.config import CameraConfig, json_object, load_config
from camera.checkpoint.source import resolve_model
from camera.engines.approximate_experts import KEY
from camera.engines.fit import engines, engines_of_constants, engines_of_outcomes
from camera.moe.budget import Budget
from camera.moe.pool import LayerPool
from camera.pipeline.memory.config_model import ConfigModel
from camera.pipeline.time.cards import CARD, CARDS
from camera.pipeline.time.costs import DISK, EFFICIENCY, run_cost, ways_on
from camera.runtime.errors import CameraError
from camera.runtime.files import CheckpointFiles
from camera.runtime.progress import format_bytes

SAMPLES, LENGTH = 128, 2048  # of the calibration that memory is estimated for
BITS = (4.0, 3.0, 2.5)
OWN_FORMAT = "in Camera's format"
PARTS = ("embeddings", "attention and norms", "router", "routed experts", "shared experts")
PARTS += ("dense FFNs", "head", "other towers")


@dataclass(frozen=True)
class Remainder:
    """What a kind of method leaves of a model: parameters and bytes, of all and of experts."""

    method: str
    setting: str
    parameters: int
    bytes: int
    experts: str


@dataclass(frozen=True)
class Description:
    """A model, counted from its config; bytes are those of `dtype`, unquantised."""

    model: str
    model_type: str
    model_class: str
    dtype: str
    published_as: str | None  # the quantisation that config.json tells of
    layers: int
    moe_layers: int
    hidden: int
    vocabulary: int
    experts: int  # of a layer, routed
    experts_per_token: int
    expert_width: int
    shared_width: int
    dense_width: int
    parameters: int
    active_parameters: int  # of a token
    bytes: int
    parts: dict[str, int]
    left: list[Remainder]
    memory: dict[str, str]
    time: dict[str, float]  # seconds on a card, by its data sheet; of the disk those beside it
    engines: dict[str, str]
    compressed: str | None = None  # how a checkpoint was made
    of_original: bool = False  # whether the counts are those of the model it was made from

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def __str__(self) -> str:
        quantised = f", published as {self.published_as}" if self.published_as else ""
        lines = [] if self.compressed is None else [f"{self.model}: {self.compressed}", ""]
        counted = "its original" if self.of_original else self.model
        lines += [
            f"{counted}: {self.model_type} ({self.model_class}), "
            f"{_billions(self.parameters)} parameters, {_billions(self.active_parameters)} of them "
            f"for a token, {format_bytes(self.bytes)} in {self.dtype}{quantised}",
            f"{self.layers} layers of width {self.hidden}, {self.moe_layers} of them with experts; "
            f"vocabulary {self.vocabulary}",
            self._experts(),
            "",
            "parameters",
        ]
        lines += [
            f"  {name:20} {_billions(size):>10} {100 * size / self.parameters:6.1f} %"
            for name, size in self.parts.items()
            if size
        ]
        lines += ["", "what methods leave"]
        lines += [
            f"  {row.method:28} {row.setting:16} {_billions(row.parameters):>10} "
            f"{format_bytes(row.bytes):>10}   {row.experts}"
            for row in self.left
        ]
        lines += ["", f"memory of camera_p, {SAMPLES} samples of {LENGTH} tokens"]
        lines += [f"  {place:18} {told}" for place, told in self.memory.items()]
        lines += ["", "time of it, computed from data sheets"]
        lines += [f"  {part:18} {took:,.1f} s" for part, took in self.time.items()]
        lines += ["", "engines"]
        lines += [f"  {name:18} {told}" for name, told in self.engines.items()]
        return "\n".join(lines)

    def _experts(self) -> str:
        dense = f"dense FFNs of width {self.dense_width}" if self.dense_width else ""
        if not self.experts:
            return dense
        shared = f", shared width {self.shared_width}" if self.shared_width else ""
        return (
            f"{self.experts} experts of width {self.expert_width}, {self.experts_per_token} for a "
            f"token{shared}{'; ' if dense else ''}{dense}"
        )


def description(
    model: str | Path,
    sparsity: float = 0.4,
    trust_remote_code: bool = False,
    card: str = CARD,
) -> Description:
    """Count a model by its config, and say what methods would leave of it at `sparsity`, which
    memory and time compressing it takes on a card (one of `CARDS`), and which engines could serve
    it: no weights are read.

    Of a compressed checkpoint that isn't native the model it was made from is counted. CameraError
    for a model that isn't supported, for an unknown card, and for a sparsity out of reach.
    """
    if card not in CARDS:
        raise CameraError(f"card={card} is none of {', '.join(CARDS)}.")
    folder = resolve_model(str(model), weights=False)
    config, file = load_config(folder, trust_remote_code), folder / CheckpointFiles.REPORT
    report = json_object(file) if file.exists() else None
    quantised = getattr(config, "quantization_config", None)
    ours = isinstance(quantised, CameraConfig)
    replaced = getattr(config, KEY, None)  # an export of ours, or of another program
    if replaced:
        taken = engines_of_constants()
    else:
        taken = engines(config) if report or ours else engines_of_outcomes(config)
    if ours:
        del config.quantization_config
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    meta = ConfigModel(config, dtype)
    views = [meta.feed_forward(index) for index in range(len(meta.layers))]
    routed = [view.routed for view in views if view.is_moe]
    shared = [g for view in views if view.is_moe for g in view.groups if not g.routed]
    dense = [view.groups[0] for view in views if not view.is_moe]
    widest = lambda groups: max((max(g.widths) for g in groups), default=0)  # noqa: E731
    experts = max((len(group.widths) for group in routed), default=0)
    top_k = meta.family.top_k(meta.config) if experts else 1
    parts = _parts(meta)
    total, pool, budget = sum(parts.values()), parts["routed experts"], meta.budget
    idle = parts["other towers"] + pool - pool * top_k // (experts or 1)
    idle += parts["embeddings"] * (parts["head"] > 0)  # of a table of its own a token reads a row
    return Description(
        model=str(model),
        model_type=config.model_type,
        model_class=type(meta.model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        published_as=None if ours else _told(quantised),
        layers=len(views),
        moe_layers=len(routed),
        hidden=budget.hidden,
        vocabulary=meta.text_config.vocab_size,
        experts=experts,
        experts_per_token=top_k,
        expert_width=widest(routed),
        shared_width=widest(shared),
        dense_width=widest(dense),
        parameters=total,
        active_parameters=total - idle,
        bytes=budget.dense.bytes,
        parts=parts,
        left=_left(budget, sparsity, widest(routed) or widest(dense)),
        memory={
            "on this machine": _memory(meta, sparsity, None),
            f"on {card}": _memory(meta, sparsity, CARDS[card].bytes),
        },
        time=_time(meta, sparsity, card),
        engines=taken,
        compressed=_made(report) if report else OWN_FORMAT if ours else _constants(replaced),
        of_original=ours or bool(replaced),
    )


def _constants(replaced: dict[str, list[int]] | None) -> str | None:
    if not replaced:
        return None
    experts = sum(map(len, replaced.values()))
    return f"{experts} of its experts are constants, in vLLM's format"


def _made(report: dict[str, Any]) -> str:
    """How a checkpoint was made and what it weighs, in a line."""
    asked, size = report["sparsity"], report["bytes"]
    removed = f", {100 * asked['moe']:.1f} % of the experts removed" if asked["moe"] else ""
    bits = report["bits"]["stored"]
    stored = f", {bits:.4g} bits a weight of the experts" if bits < report["bits"]["raw"] else ""
    native = "native" if report["native"] else OWN_FORMAT
    return (
        f"compressed by {report['method']}{removed}{stored}: "
        f"{format_bytes(size['compressed'])} instead of {format_bytes(size['dense'])}, {native}"
    )


def _memory(model: ConfigModel, sparsity: float, card: int | None) -> str:
    found = model.memory(SAMPLES * LENGTH, LENGTH, sparsity, card)
    more = card is not None and found.peak > card
    return f"{found}{'; that is more than it has: set memory.experts=disk' if more else ''}"


def _time(model: ConfigModel, sparsity: float, name: str) -> dict[str, float]:
    """Seconds of Camera-P on a card, and of the disk beside it: the longer of both decides."""
    tokens, card = SAMPLES * LENGTH, CARDS[name]
    ways = ways_on(card, model.memory(tokens, LENGTH, sparsity, card.bytes))
    found = run_cost(
        model.config, tokens, LENGTH, sparsity=sparsity, ways=ways, dtype=model.dtype
    ).seconds(card, EFFICIENCY, DISK)
    return {f"on {name}": found.total, "disk, beside it": found.disk}


def _told(quantised: Any) -> str | None:
    told = quantised if isinstance(quantised, dict) else vars(quantised or object)
    return None if quantised is None else str(told.get("quant_method"))


def _parts(model: ConfigModel) -> dict[str, int]:
    """Parameters by part, tied ones once."""
    found = dict.fromkeys(PARTS, 0)
    groups, routers = {}, set()
    for index in range(len(model.layers)):
        view = model.feed_forward(index)
        for group in view.groups:
            kind = "routed experts" if group.routed else "shared experts"
            groups[group.path] = kind if view.is_moe else "dense FFNs"
        if view.is_moe:
            root = f"{view.path}.{view.family.ffn}"
            routers |= {f"{root}.{view.family.router}.", f"{root}.{view.family.shared_gate}."}
            routers |= {f"{root}.{name}" for name in view.family.block_rows}
    names = {module: name for name, module in model.model.named_modules()}
    embeddings = f"{names[model.model.get_input_embeddings()]}."
    head = f"{names.get(model.model.get_output_embeddings(), 'none')}."
    decoder = f"{model.root.removesuffix('layers')}"
    tied = set(getattr(model.model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.model.state_dict().items():
        if name in tied:
            continue
        parents = [name.rsplit(".", depth)[0] for depth in range(1, 4)]
        part = next((groups[parent] for parent in parents if parent in groups), None)
        if part is None:
            part = "attention and norms" if name.startswith(decoder) else "other towers"
            if name.startswith(embeddings):
                part = "embeddings"
            elif name.startswith(head):
                part = "head"
            elif name.startswith(tuple(routers)):
                part = "router"
        found[part] += tensor.numel()
    return found


def _left(budget: Budget, sparsity: float, width: int) -> list[Remainder]:
    """What each kind of method leaves."""
    dense = budget.dense
    each, share = dense.bytes / dense.model, f"sparsity={sparsity}"
    left = dense.model - int(budget.pool_ratio(sparsity, "moe") * dense.moe)
    told = f"width {width - int(width * sparsity)} of {width} on average"
    rows = [Remainder("micro-expert pruning", share, left, int(left * each), told)]
    whole = [_without_experts(pool, budget.hidden, sparsity) for pool in budget.layers.values()]
    if None not in whole:
        left = dense.model - sum(removed for removed, _, _ in whole)
        told = "{1} of {2} experts in a layer".format(*whole[0])
        rows.append(Remainder("whole-expert pruning", share, left, int(left * each), told))
    for bits in BITS:
        size = int((dense.model - dense.moe) * each + dense.moe * bits / 8)
        told = "scales included, what isn't an expert as it is"
        rows.append(Remainder("quantisation", f"bits={bits:g}", dense.model, size, told))
    return rows


def _without_experts(pool: LayerPool, hidden: int, sparsity: float) -> tuple[int, int, int] | None:
    """(parameters removed, experts that stay, experts) of a layer; None where none can go."""
    routing = pool.routing
    if routing is None:
        return None
    width = next(w for w, is_routed in zip(pool.widths, pool.routed, strict=True) if is_routed)
    gone = min(round(routing.experts * sparsity / routing.groups) * routing.groups, routing.most)
    return gone * (3 * hidden * width + routing.row), routing.experts - gone, routing.experts


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e7 else f"{parameters / 1e6:.3f} M"
