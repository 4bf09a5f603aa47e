"""Model families as data: all facts of a family in one declaration.

A new family is one entry of `FAMILIES` (from outside: `register_family` and an entry point) and a
tiny model in tests/helpers/models.py, on which every equality test then runs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any

from camera.runtime.errors import CameraError

ENTRY_POINTS = "camera.families"  # of other packages: a model type, and the module declaring it
_IN_A_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_FUSED = r"\.experts\.(gate_up_proj|down_proj)$"
_GRANITE = r"\.(input|output)_linear\.weight$"


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
    stacked: re.Pattern[str] = re.compile(_FUSED)

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
    """`attention_width` of multi-head latent attention (DeepSeek-V2, V3)."""
    return config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim


@dataclass(frozen=True)
class Family:
    """One model family: attribute names inside a decoder layer, and the facts of its models.

    A layer without `experts` is a dense FFN. shared_gate: its sigmoid scales the shared expert.
    residual_scale: attribute of the layer that scales the outputs of both its parts. router_rows:
    tensors of the router with one row an expert. added_to_scores: buffer that the router adds
    before it chooses. elsewhere: keys of config.json that other programs read, in which
    transformers' own class differs or says nothing. register: module whose `register` teaches
    transformers a model type that it lacks.
    """

    ffn: str = "mlp"
    experts: str = "experts"
    router: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None
    residual_scale: str | None = None
    attention_output: str = "self_attn.o_proj"
    keys: ConfigKeys = ConfigKeys()
    router_rows: tuple[str, ...] = ("weight", "bias", "e_score_correction_bias")
    added_to_scores: str | None = "e_score_correction_bias"
    groups: Callable[[Any], RouterGroups] = router_groups
    checkpoint_names: ExpertNames = ExpertNames()
    attention_width: Callable[[Any], int] = attention_width
    elsewhere: Mapping[str, Any] = field(default_factory=dict)
    register: str | None = None

    def top_k(self, config: Any) -> int:
        """Experts per token; 1 for a dense model."""
        return getattr(config, self.keys.top_k, 1)

    def is_routed(self, path: str) -> bool:
        """Whether a module path is that of routed experts."""
        return path.endswith(f".{self.experts}")

    def is_shared(self, path: str) -> bool:
        """Whether a module path is that of a shared expert."""
        return self.shared is not None and path.endswith(f".{self.shared}")


_LOCAL = ConfigKeys(experts="num_local_experts", width="intermediate_size")
_DEEPSEEK = Family(
    shared="shared_experts",
    keys=ConfigKeys(experts="n_routed_experts", shared_count="n_shared_experts"),
)
_LATENT = replace(_DEEPSEEK, attention_width=latent_attention_width)
FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        keys=ConfigKeys(shared_width="shared_expert_intermediate_size"),
    ),
    "qwen3_moe": Family(),
    "mixtral": Family(keys=_LOCAL),
    "phimoe": Family(
        router="router", keys=_LOCAL, elsewhere={"architectures": ["PhiMoEForCausalLM"]}
    ),
    "olmoe": Family(keys=ConfigKeys(width="intermediate_size")),
    "deepseek": replace(_DEEPSEEK, register="camera.moe.deepseek"),
    "deepseek_v2": _LATENT,
    "deepseek_v3": replace(_LATENT, elsewhere={"scoring_func": "sigmoid"}),
    "granitemoe": Family(
        ffn="block_sparse_moe",
        router="router",
        residual_scale="residual_multiplier",
        keys=_LOCAL,
        checkpoint_names=ExpertNames(stacked=re.compile(rf"{_FUSED}|{_GRANITE}")),
    ),
    "llama": Family(),
    "qwen3": Family(),
}


def register_family(model_type: str, family: Family) -> None:
    """Declare a model type that transformers knows and `FAMILIES` lacks."""
    FAMILIES[model_type] = family


def family_of(model_type: str) -> Family:
    """The declaration of a model type; CameraError, naming the known ones, if there is none."""
    if model_type not in FAMILIES:
        for declaring in entry_points(group=ENTRY_POINTS, name=model_type):
            declaring.load()  # a module that calls `register_family`
    if model_type not in FAMILIES:
        raise CameraError(
            f"model type '{model_type}' is not supported: declare where its experts sit with "
            "camera.moe.families.register_family, or choose a model of "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None for one outside the layers."""
    found = _IN_A_LAYER.search(name)
    return int(found[1]) if found else None


def is_routed(path: str) -> bool:
    """Whether a module path is that of routed experts, in any family."""
    return any(family.is_routed(path) for family in FAMILIES.values())
