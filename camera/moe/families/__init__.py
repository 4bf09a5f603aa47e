"""Model families as data: all facts of a family in one declaration.

A new family is one entry of `FAMILIES` (from outside: `register_family` and an entry point) and a
tiny model in tests/helpers, on which the equality tests then run.
"""

import re
from dataclasses import replace
from importlib.metadata import entry_points

from camera.moe.families.activations import clamped, named, silu_of_the_code
from camera.moe.families.family import (
    FUSED,
    ConfigKeys,
    ExpertNames,
    Family,
    latent_attention_width,
)
from camera.runtime.errors import CameraError

ENTRY_POINTS = "camera.families"  # of other packages: a model type, and the module declaring it
_IN_A_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_GRANITE = r"\.block_sparse_moe\.(input|output)_linear\.weight$"

_LOCAL = ConfigKeys(experts="num_local_experts", width="intermediate_size")
_DEEPSEEK = Family(
    shared="shared_experts",
    keys=ConfigKeys(experts="n_routed_experts", shared_count="n_shared_experts"),
)
_LATENT = replace(_DEEPSEEK, attention_width=latent_attention_width)
_GRANITE_MOE = Family(
    ffn="block_sparse_moe",
    router="router",
    residual_scale="residual_multiplier",
    keys=_LOCAL,
    checkpoint_names=ExpertNames(stacked=re.compile(rf"{FUSED}|{_GRANITE}")),
)
_QWEN = Family(
    shared="shared_expert",
    shared_gate="shared_expert_gate",
    keys=ConfigKeys(shared_width="shared_expert_intermediate_size"),
)
_QWEN_HYBRID = replace(_QWEN, runs_on_meta=False)
_DELTA = Family(
    shared="shared_experts",
    keys=ConfigKeys(shared_count="num_shared_experts", top_k="num_experts_per_token"),
    attention_width=latent_attention_width,
    runs_on_meta=False,
)
FAMILIES: dict[str, Family] = {
    "qwen2_moe": _QWEN,
    "qwen3_moe": Family(),
    "mixtral": Family(keys=_LOCAL),
    "phimoe": Family(
        router="router", keys=_LOCAL, elsewhere={"architectures": ["PhiMoEForCausalLM"]}
    ),
    "olmoe": Family(keys=ConfigKeys(width="intermediate_size")),
    "deepseek": replace(_DEEPSEEK, register="camera.moe.families.deepseek"),
    "deepseek_v2": _LATENT,
    "deepseek_v3": replace(_LATENT, elsewhere={"scoring_func": "sigmoid"}),
    "granitemoe": _GRANITE_MOE,
    # a shared expert beside the block, which stays as it is
    "granitemoeshared": _GRANITE_MOE,
    "granitemoe_swa": _GRANITE_MOE,
    "granitemoehybrid": replace(_GRANITE_MOE, runs_on_meta=False),
    "glm4_moe": _DEEPSEEK,
    "glm4_moe_lite": _LATENT,
    "dots1": _DEEPSEEK,
    "solar_open": _DEEPSEEK,
    "exaone_moe": replace(_DEEPSEEK, keys=ConfigKeys(shared_count="num_shared_experts")),
    "mimo_v2_flash": Family(keys=ConfigKeys(experts="n_routed_experts")),
    "deepseek_v32": replace(_LATENT, runs_on_meta=False),
    "axk2": replace(_LATENT, runs_on_meta=False),
    "glm_moe_dsa": replace(
        _LATENT, hands_on=("prev_topk_indices", "index_topk"), runs_on_meta=False
    ),
    "bailing_hybrid": _DELTA,
    "kimi_linear": _DELTA,
    "hunyuan_v1_moe": Family(
        shared="shared_mlp",
        keys=ConfigKeys(
            width="intermediate_size", shared_width="intermediate_size", top_k="moe_topk"
        ),
        router_rows=("wg.weight",),
    ),
    "hy_v3": Family(
        shared="shared_experts",
        keys=ConfigKeys(shared_count="num_shared_experts"),
        block_rows=("e_score_correction_bias",),
    ),
    "minimax_m2": Family(keys=_LOCAL, block_rows=("e_score_correction_bias",)),
    "minimax": Family(
        keys=_LOCAL,
        residual_scale="mlp_beta_factor",
        attention_output=None,  # the scale is that of the FFN alone
        runs_on_meta=False,
    ),
    "ernie4_5_moe": Family(
        shared="shared_experts",
        keys=ConfigKeys(
            experts="moe_num_experts", shared_count="moe_num_shared_experts", top_k="moe_k"
        ),
        router_rows=("weight", "moe_statics.e_score_correction_bias"),
        added_to_scores="moe_statics.e_score_correction_bias",
    ),
    "qwen3_next": _QWEN_HYBRID,
    "qwen3_5_moe_text": _QWEN_HYBRID,
    "lfm2_moe": Family(
        ffn="feed_forward",
        final_norm="embedding_norm",
        mlp=("w1", "w3", "w2"),
        activation=silu_of_the_code,
        attention_output="self_attn.out_proj",
        block_rows=("expert_bias",),
        added_to_scores="expert_bias",
        runs_on_meta=False,
    ),
    "jamba": Family(
        ffn="feed_forward",
        router="router",
        final_norm="final_layernorm",
        keys=ConfigKeys(width="intermediate_size"),
        runs_on_meta=False,
    ),
    "flint": Family(
        shared="shared_expert", keys=ConfigKeys(shared_width="shared_expert_intermediate_size")
    ),
    "mellum": Family(keys=ConfigKeys(experts="num_local_experts")),
    "flex_olmo": Family(
        output_norm="post_feedforward_layernorm", keys=ConfigKeys(width="intermediate_size")
    ),
    "afmoe": Family(
        router="router",
        shared="shared_experts",
        output_norm="post_mlp_layernorm",
        keys=ConfigKeys(shared_count="num_shared_experts"),
        router_rows=("gate.weight",),
        block_rows=("expert_bias",),
        added_to_scores="expert_bias",
        router_reads_samples=True,
    ),
    "kolibri1": Family(
        shared="shared_experts",
        output_norm="post_mlp_layernorm",
        keys=ConfigKeys(
            experts="num_local_experts", shared_width="shared_expert_intermediate_size"
        ),
    ),
    "gpt_oss": Family(
        router="router",
        returns_routing=True,
        activation=clamped("alpha", "limit"),
        keys=_LOCAL,
    ),
    "laguna": Family(
        shared="shared_experts",
        routed_scale="routed_scaling_factor",
        keys=ConfigKeys(shared_width="shared_expert_intermediate_size"),
    ),
    "cohere2_moe": Family(
        shared="shared_experts",
        attention_output=None,  # it reads what the FFN reads, whose output it can't correct
        keys=ConfigKeys(
            width="intermediate_size",
            shared_width="intermediate_size",
            shared_count="num_shared_experts",
            dense_width="prefix_dense_intermediate_size",
        ),
    ),
    # models of text and images: what isn't their decoder is copied as it is
    "qwen3_5_moe": replace(_QWEN_HYBRID, tower="language_model"),
    "qwen3_vl_moe": Family(tower="language_model", runs_on_meta=False),
    "glm4v_moe": replace(_DEEPSEEK, tower="language_model", runs_on_meta=False),
    "deepseek_ocr2": replace(_DEEPSEEK, tower="language_model", runs_on_meta=False),
    "unlimited_ocr": replace(_DEEPSEEK, tower="language_model", runs_on_meta=False),
    "dots3_note": replace(
        _LATENT,
        tower="language_model",
        keys=replace(_DEEPSEEK.keys, shared_width="shared_experts_intermediate_size"),
        runs_on_meta=False,
    ),
    # its decoder is that of mistral4, or a dense one
    "mistral3": replace(_LATENT, tower="language_model", runs_on_meta=False),
    "aria": Family(
        tower="language_model",
        router="router",
        shared="shared_experts",
        keys=ConfigKeys(
            experts="moe_num_experts",
            width="intermediate_size",
            shared_width="intermediate_size",
            shared_count="moe_num_shared_experts",
            top_k="moe_topk",
        ),
        runs_on_meta=False,
    ),
    "llama4": Family(
        tower="language_model.model",
        ffn="feed_forward",
        router="router",
        shared="shared_expert",
        weighs_inputs=True,
        returns_routing=True,
        activation=named("act_fn", "activation_fn"),
        adapt="camera.moe.families.llama4",
        keys=ConfigKeys(
            experts="num_local_experts",
            width="intermediate_size",
            shared_width="intermediate_size",
            dense_width="intermediate_size_mlp",
        ),
        runs_on_meta=False,
    ),
    "llama": Family(),
    "qwen3": Family(),
}
# their models compute on meta, where shapes are all that there is
RUN_ON_META = frozenset(name for name, family in FAMILIES.items() if family.runs_on_meta)


def register_family(model_type: str, family: Family) -> None:
    """Declare a model type that transformers knows and `FAMILIES` lacks."""
    FAMILIES[model_type] = family


def known_family(model_type: str) -> Family | None:
    """The declaration of a model type; None if there is none."""
    if model_type not in FAMILIES:
        for declaring in entry_points(group=ENTRY_POINTS, name=model_type):
            declaring.load()  # a module that calls `register_family`
    return FAMILIES.get(model_type)


def family_of(model_type: str) -> Family:
    """The declaration of a model type; CameraError, naming the known ones, if there is none."""
    found = known_family(model_type)
    if found is None:
        raise CameraError(
            f"model type '{model_type}' is not supported: declare where its experts sit with "
            "camera.moe.families.register_family, or choose a model of "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return found


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None for one outside the layers."""
    found = _IN_A_LAYER.search(name)
    return int(found[1]) if found else None


def is_routed(path: str) -> bool:
    """Whether a module path is that of routed experts, in any family."""
    return any(family.is_routed(path) for family in FAMILIES.values())
