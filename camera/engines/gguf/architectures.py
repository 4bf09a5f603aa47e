"""What llama.cpp computes for a family: its name there, its metadata, and where it differs.

Source: llama.cpp `src/llama-model.cpp` and `src/models/`, each entry compared with transformers by
log-probabilities (tests/camera/engines/test_gguf.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from camera.runtime.errors import CameraError

Config = Any
Metadata = dict[str, int | float | bool]
SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures as the target of a family.

    interleaved: its rotary embedding pairs neighbouring rows of q and k, which are therefore
    reordered. own_head: it wants output.weight even where the head is tied to the embedding.
    metadata: keys beside the common ones, without the architecture's prefix. asks: {key of
    config.json: the value that llama.cpp takes for granted}.
    """

    name: str
    interleaved: bool = False
    own_head: bool = False
    metadata: Callable[[Config], Metadata] = lambda config: {}
    asks: Mapping[str, Any] | None = None

    def require(self, config: Config) -> None:
        """CameraError if llama.cpp would compute something else for this configuration."""
        for key, value in (self.asks or {}).items():
            found = getattr(config, key, value)
            if found != value:
                raise CameraError(
                    f"llama.cpp's {self.name} has {key}={value} built in and this model has {key}="
                    f"{found}: its GGUF would give other answers, so none is written."
                )
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise CameraError(
                f"this model's layers are {', '.join(sorted(kinds))}: only full attention is "
                "written to GGUF."
            )


def _experts(config: Config, experts: str, width: int | None) -> Metadata:
    found: Metadata = {
        "expert_count": getattr(config, experts),
        "expert_used_count": config.num_experts_per_tok,
    }
    if width is not None:
        found["expert_feed_forward_length"] = width
    return found


def _qwen2_moe(config: Config) -> Metadata:
    return _experts(config, "num_experts", config.moe_intermediate_size) | {
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size
    }


def _rotary(config: Config) -> Metadata:
    return {"rope.dimension_count": _head(config), "vocab_size": config.vocab_size}


def _head(config: Config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _deepseek(config: Config) -> Metadata:
    return _experts(config, "n_routed_experts", config.moe_intermediate_size) | {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": 1.0,
        **_rotary(config),
    }


def _latent(config: Config) -> Metadata:
    rotary, latent = config.qk_rope_head_dim, config.kv_lora_rank
    found = _experts(config, "n_routed_experts", config.moe_intermediate_size) | {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_shared_count": config.n_shared_experts or 0,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "vocab_size": config.vocab_size,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rotary,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_nope_head_dim + rotary,
        "attention.value_length_mla": config.v_head_dim,
        "attention.head_count_kv": 1,
        "rope.dimension_count": rotary,
    }
    if config.q_lora_rank:
        found["attention.q_lora_rank"] = config.q_lora_rank
    return found


def _deepseek_v2(config: Config) -> Metadata:
    return _latent(config) | {"expert_weights_norm": False, "expert_gating_func": SOFTMAX}


def _deepseek_v3(config: Config) -> Metadata:
    found = _latent(config) | {
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": SIGMOID,
    }
    if config.n_group > 1:
        found |= {"expert_group_count": config.n_group}
        found |= {"expert_group_used_count": config.topk_group}
    return found


def _granite(config: Config) -> Metadata:
    return (
        _experts(config, "num_local_experts", None)
        | _rotary(config)
        | {
            "attention.scale": float(config.attention_multiplier),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
    )


ARCHITECTURES: dict[str, Architecture] = {
    "qwen2_moe": Architecture(
        "qwen2moe",
        own_head=True,
        metadata=_qwen2_moe,
        asks={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen3_moe": Architecture(
        "qwen3moe",
        metadata=lambda config: _experts(config, "num_experts", config.moe_intermediate_size),
        asks={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "olmoe": Architecture(
        "olmoe",
        own_head=True,
        metadata=lambda config: _experts(config, "num_experts", None),
        asks={"norm_topk_prob": False, "clip_qkv": None},
    ),
    "mixtral": Architecture(
        "llama",
        interleaved=True,
        metadata=lambda config: _experts(config, "num_local_experts", None) | _rotary(config),
        asks={"sliding_window": None},
    ),
    "deepseek": Architecture(
        "deepseek",
        interleaved=True,
        metadata=_deepseek,
        asks={
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
            "moe_layer_freq": 1,
        },
    ),
    "deepseek_v2": Architecture("deepseek2", metadata=_deepseek_v2, asks={"topk_method": "greedy"}),
    "deepseek_v3": Architecture("deepseek2", metadata=_deepseek_v3),
    "granitemoe": Architecture("granitemoe", interleaved=True, metadata=_granite),
    "llama": Architecture("llama", interleaved=True, metadata=_rotary),
    "qwen3": Architecture("qwen3"),
}
REFUSED = {
    "phimoe": "llama.cpp has RMSNorm and plain softmax where the model has LayerNorm and "
    "sparsemixer",
}


def architecture_of(config: Config) -> Architecture:
    """llama.cpp's architecture for a model; CameraError where none computes the same."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        why = REFUSED.get(kind, "it isn't among " + ", ".join(sorted(ARCHITECTURES)))
        raise CameraError(f"a model of type {kind} can't be written as GGUF: {why}.")
    found = ARCHITECTURES[kind]
    found.require(config)
    return found


def metadata(config: Config, architecture: Architecture) -> Metadata:
    """All keys of the model's sizes, without the architecture's prefix."""
    found: Metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if getattr(config, "head_dim", None):
        found |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    return found | _rope(config) | architecture.metadata(config)


def _rope(config: Config) -> Metadata:
    rope = config.rope_parameters
    found: Metadata = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return found
    if kind == "linear":
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
        if rope.get("mscale_all_dim"):
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
        return found
    raise CameraError(f"rope_type={kind} isn't written to GGUF: default, linear and yarn are.")
