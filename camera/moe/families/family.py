"""What a declaration of a model family says: where its parts sit, and how its config names them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from camera.moe.families.activations import own_activation

FUSED = r"\.experts\.(gate_up_proj|down_proj)(_bias)?$"


@dataclass(frozen=True)
class ConfigKeys:
    """Keys of config.json that hold the sizes of a family's experts.

    shared_count: how many experts of `shared_width` the shared expert is as wide as; None: one.
    prediction_layers: how many layers for several tokens at once follow the last one.
    """

    experts: str = "num_experts"
    width: str = "moe_intermediate_size"
    shared_width: str = "moe_intermediate_size"
    shared_count: str | None = None
    dense_width: str = "intermediate_size"
    top_k: str = "num_experts_per_tok"
    prediction_layers: str = "num_nextn_predict_layers"


@dataclass(frozen=True)
class ExpertNames:
    """Names of routed experts in checkpoints.

    one: a tensor of one expert, whose number is the second of three groups. stacked: a tensor of
    all experts of a layer.
    """

    one: re.Pattern[str] = re.compile(r"(\.experts\.)(\d+)(\.)")
    stacked: re.Pattern[str] = re.compile(FUSED)

    def holds(self, key: str) -> bool:
        """Whether a tensor of this name holds routed experts."""
        return bool(self.one.search(key) or self.stacked.search(key))

    def number(self, key: str) -> int | None:
        """The expert of a tensor of one expert, else None."""
        found = self.one.search(key)
        return None if found is None else int(found.group(2))

    def as_first(self, key: str) -> str:
        """The name that a tensor of one expert has if its expert is number 0."""
        return self.one.sub(r"\g<1>0\g<3>", key)


@dataclass(frozen=True)
class RouterGroups:
    """Groups of neighbouring experts of a group-limited router.

    A token's experts come from the `open` best of `count` groups of equal size; a group's score
    needs `least` experts.
    """

    count: int = 1
    open: int = 1
    least: int = 1


def router_groups(router: Any) -> RouterGroups:
    """The groups of a router with DeepSeek's attributes; one group where it has none.

    V2 groups if its topk_method says so, V3 always, by the sum of each group's best two.
    """
    if not getattr(router, "num_group", None) or getattr(router, "topk_method", "") == "greedy":
        return RouterGroups()
    least = 1 if hasattr(router, "topk_method") else 2
    return RouterGroups(router.num_group, router.topk_group, least)


def attention_width(config: Any) -> int:
    """Multiplications of one head for a query and a key, and for a probability and a value."""
    head = getattr(config, "head_dim", None)
    return 2 * (head or config.hidden_size // config.num_attention_heads)


def latent_attention_width(config: Any) -> int:
    """`attention_width` of multi-head latent attention (DeepSeek-V2, V3), where a model has it."""
    if not hasattr(config, "qk_nope_head_dim"):
        return attention_width(config)
    return config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim


@dataclass(frozen=True)
class Family:
    """One model family: attribute names inside a decoder layer, and the facts of its models.

    A layer without `experts` is a dense FFN, of the three linear layers `mlp`. activation: that of
    a module of experts, or of a dense FFN. shared_gate: its sigmoid scales the shared expert.
    routed_scale: attribute of `ffn` by which it multiplies the sum of its routed experts.
    weighs_inputs: an expert's routing weight scales what it reads, not what it puts out.
    returns_routing: `ffn` returns what its router said beside its output. What a layer computes
    beside `ffn` from the same input is left as it is. residual_scale: attribute of the layer that
    scales the outputs of both its parts.
    output_norm: norm of the layer through which the FFN's output goes before it is added. Layers
    without `attention_output` keep their attention as it is; None: all do. router_rows: tensors of
    the router with one row an expert; block_rows: those of `ffn` itself. added_to_scores: buffer of
    the router, or of `ffn` where it is one of block_rows, that is added before it chooses.
    router_reads_samples: the router takes [B, L, H] instead of [T, H].
    elsewhere: keys of config.json that other programs read, in which transformers' own class
    differs or says nothing. register: module whose `register` teaches transformers a model type
    that it lacks. adapt: module whose `adapt` gives a freshly built model blocks that call their
    experts as those of other families do. hands_on: the argument by which a layer is handed the
    tokens that the one before it attended to, and the key of config.json that says how many these
    are at most; layers then return both. runs_on_meta: its code asks for no number of a tensor.
    tower: where the decoder is in a model of text and images.
    """

    ffn: str = "mlp"
    experts: str = "experts"
    router: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None
    residual_scale: str | None = None
    output_norm: str | None = None
    final_norm: str = "norm"
    mlp: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    activation: Callable[[Any], Any] = own_activation
    routed_scale: str | None = None
    weighs_inputs: bool = False
    returns_routing: bool = False
    attention_output: str | None = "self_attn.o_proj"
    keys: ConfigKeys = ConfigKeys()
    router_rows: tuple[str, ...] = ("weight", "bias", "e_score_correction_bias")
    block_rows: tuple[str, ...] = ()
    added_to_scores: str | None = "e_score_correction_bias"
    router_reads_samples: bool = False
    groups: Callable[[Any], RouterGroups] = router_groups
    checkpoint_names: ExpertNames = ExpertNames()
    attention_width: Callable[[Any], int] = attention_width
    elsewhere: Mapping[str, Any] = field(default_factory=dict)
    tower: str = ""
    register: str | None = None
    adapt: str | None = None
    hands_on: tuple[str, str] | None = None
    runs_on_meta: bool = True

    def top_k(self, config: Any) -> int:
        """Experts per token, the most of any layer; 1 for a dense model."""
        told = getattr(config.get_text_config() if self.tower else config, self.keys.top_k, 1)
        return max(told) if isinstance(told, (list, tuple)) else told

    def router_input(self, x_TH: Any) -> Any:
        """Tokens in the shape that the router takes."""
        return x_TH[None] if self.router_reads_samples else x_TH

    def is_routed(self, path: str) -> bool:
        """Whether a module path is that of routed experts."""
        return path.endswith(f".{self.experts}")

    def is_ffn(self, path: str) -> bool:
        """Whether a module path is that of experts or of a dense FFN."""
        return self.is_routed(path) or self.is_shared(path) or path.endswith(f".{self.ffn}")

    def is_shared(self, path: str) -> bool:
        """Whether a module path is that of a shared expert."""
        return self.shared is not None and path.endswith(f".{self.shared}")
