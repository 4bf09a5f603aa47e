"""Tiny models of the families whose structure is that of another one, or nearly.

Tests of all methods run on `REPRESENTATIVES`, one of each structure; the others have a short list
(tests/integration/test_newer_families.py).
"""

from typing import Any

_DENSE = dict(num_key_value_heads=2, head_dim=8, intermediate_size=64)
_MOE = dict(**_DENSE, moe_intermediate_size=24, num_experts_per_tok=3)
_GROUPED = dict(
    **_MOE, n_routed_experts=8, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1
)
_LATENT = dict(
    _GROUPED,
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)
_LATENT.pop("head_dim")
_INDEXED = dict(_LATENT, index_head_dim=16, index_n_heads=2, index_topk=64)
_SHARED = dict(**_MOE, num_experts=8, shared_expert_intermediate_size=40)
_LOCAL = dict(
    num_key_value_heads=2, intermediate_size=24, num_local_experts=8, num_experts_per_tok=3
)
_LINEAR = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
_GRANITE = dict(_LOCAL, shared_intermediate_size=40, residual_multiplier=0.22)
_DELTA = dict(
    moe_intermediate_size=24,
    intermediate_size=64,
    num_experts=8,
    num_experts_per_token=3,
    num_shared_experts=1,
    num_expert_group=1,
    topk_group=1,
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
    mlp_layer_types=["dense", "sparse"],
)

NEWER: dict[str, dict[str, Any]] = {
    "afmoe": dict(**_MOE, num_experts=8, num_shared_experts=1, num_dense_layers=1),
    "axk2": _INDEXED,
    "bailing_hybrid": dict(_DELTA, q_lora_rank=16, linear_head_dim=8, linear_num_heads=4),
    "cohere2_moe": dict(
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        prefix_dense_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=3,
        num_shared_experts=2,
        shared_expert_combination_strategy="sum",
        mlp_layer_types=["dense", "sparse"],
    ),
    "deepseek_v32": _INDEXED,
    "dots1": _GROUPED,
    "ernie4_5_moe": dict(
        num_key_value_heads=2,
        intermediate_size=64,
        moe_intermediate_size=24,
        moe_num_experts=8,
        moe_k=3,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=5,
    ),
    "exaone_moe": dict(
        **_MOE,
        num_experts=8,
        num_shared_experts=1,
        n_group=1,
        topk_group=1,
        mlp_layer_types=["dense", "sparse"],
    ),
    "flex_olmo": dict(
        num_key_value_heads=2, intermediate_size=24, num_experts=8, num_experts_per_tok=3
    ),
    "flint": dict(_SHARED, mlp_only_layers=[0]),
    "glm4_moe": _GROUPED,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": dict(
        _INDEXED,
        num_hidden_layers=3,
        mlp_layer_types=["dense", "sparse", "sparse"],
        indexer_types=["full", "shared", "full"],
    ),
    "gpt_oss": dict(
        _LOCAL,
        head_dim=8,
        swiglu_limit=0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": dict(
        _GRANITE,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": dict(
        num_key_value_heads=2, head_dim=8, intermediate_size=24, num_experts=8, moe_topk=3
    ),
    "hy_v3": dict(**_MOE, num_experts=8, num_shared_experts=1, first_k_dense_replace=1),
    "jamba": dict(
        num_key_value_heads=2,
        intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_dt_rank=4,
        mamba_d_state=8,
    ),
    "kimi_linear": dict(_DELTA, linear_head_dim=8, linear_num_heads=4),
    "kolibri1": dict(_SHARED, num_local_experts=8),
    "laguna": dict(
        _SHARED,
        moe_routed_scaling_factor=2.5,
        mlp_layer_types=["dense", "sparse"],
    ),
    "lfm2_moe": dict(
        num_key_value_heads=2,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"],
    ),
    "mellum": dict(**_MOE, num_local_experts=8),
    "mimo_v2_flash": dict(**_MOE, n_routed_experts=8, n_group=1, topk_group=1),
    "minimax": dict(_LOCAL, head_dim=8, mlp_beta_factor=0.5, mlp_alpha_factor=2.0),
    "minimax_m2": dict(_LOCAL, head_dim=8, rotary_dim=8),
    "qwen3_5_moe_text": dict(**_SHARED, **_LINEAR),
    "qwen3_next": dict(**_SHARED, **_LINEAR),
    "solar_open": _GROUPED,
}
NEWER["kolibri1"].pop("num_experts")
# a structure -> the family that stands for it
REPRESENTATIVES = {
    "linear attention, a gated shared expert": "qwen3_next",
    "convolutions, dense layers of other names": "lfm2_moe",
    "state space layers, a shared expert beside the block": "granitemoehybrid",
    "a bias of the block": "minimax_m2",
    "a bias inside the router, a number of shared experts": "ernie4_5_moe",
    "a linear layer inside the router, one width for all": "hunyuan_v1_moe",
    "a norm after the block, a router that reads samples": "afmoe",
    "a scale of the block alone": "minimax",
    "biased, transposed and interleaved experts, a clamped activation": "gpt_oss",
}

_VISION = dict(
    depth=1,
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    out_hidden_size=32,
    patch_size=4,
    num_position_embeddings=16,
)
_MROPE = {"rope_type": "default", "rope_theta": 1e4}
_ONE_LAYER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
_PATCHES = dict(_ONE_LAYER, image_size=8, patch_size=4)
_SAM = dict(
    hidden_size=16,
    output_channels=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
    window_size=2,
    global_attn_indexes=[0],
    mlp_dim=16,
    downsample_channels=[8, 16],
)
_OCR = dict(_MOE, n_routed_experts=8, n_shared_experts=1, mlp_layer_types=["dense", "sparse"])
# model type -> its text config, and those of its other towers
NESTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "aria": (
        dict(
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=24,
            moe_num_experts=8,
            moe_topk=3,
            moe_num_shared_experts=2,
        ),
        dict(vision_config=dict(_PATCHES, model_type="idefics3_vision")),
    ),
    "deepseek_ocr2": (
        _OCR,
        dict(
            vision_config=dict(
                sam_config=_SAM, encoder_config=dict(_ONE_LAYER, num_key_value_heads=2)
            )
        ),
    ),
    "dots3_note": (
        dict(
            _INDEXED,
            head_dim=16,
            shared_experts_intermediate_size=24,
            mlp_layer_types=["dense", "sparse"],
            layer_types=["indexed_attention"] * 2,
        ),
        dict(
            vision_config=dict(
                _ONE_LAYER,
                patch_size=4,
                moe_intermediate_size=8,
                mlp_layer_types=["dense"],
                num_local_experts=2,
                num_experts_per_tok=1,
                adapter_in_dim=16,
                adapter_out_dim=32,
            ),
            audio_config=dict(
                _ONE_LAYER,
                downsample_hidden_size=4,
                feature_size=8,
                adapter_input_size=16,
                adapter_out_dim=32,
            ),
        ),
    ),
    "glm4v_moe": (
        dict(
            _GROUPED,
            rope_parameters=dict(_MROPE, mrope_section=[1, 1, 0], partial_rotary_factor=0.5),
        ),
        dict(vision_config=_VISION),
    ),
    "llama4": (
        dict(
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=24,
            intermediate_size_mlp=64,
            num_local_experts=8,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
        ),
        dict(
            vision_config=dict(
                _PATCHES,
                intermediate_size=64,
                vision_output_dim=16,
                projector_input_dim=16,
                projector_output_dim=16,
            )
        ),
    ),
    "mistral3": (
        dict(_LATENT, model_type="mistral4"),
        dict(vision_config=dict(_PATCHES, model_type="pixtral")),
    ),
    "qwen3_5_moe": (NEWER["qwen3_5_moe_text"], dict(vision_config=_VISION)),
    "qwen3_vl_moe": (
        dict(**_MOE, num_experts=8, rope_parameters=dict(_MROPE, mrope_section=[2, 1, 1])),
        dict(vision_config=dict(_VISION, deepstack_visual_indexes=[0])),
    ),
    "unlimited_ocr": (
        _OCR,
        dict(
            vision_config=dict(
                sam_config=_SAM, encoder_config=dict(_ONE_LAYER, image_size=32, patch_size=8)
            )
        ),
    ),
}
