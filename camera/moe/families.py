"""Model families as data: where a decoder layer keeps the parts that micro-expert methods need.

Adding a family is one line in `FAMILIES` (or `register_family` from outside), plus a line of
`tests/conftest.py` so that every equality test runs on a tiny random model of it.
"""

from dataclasses import dataclass

from camera.runtime.errors import CameraError


@dataclass(frozen=True)
class Family:
    """Attribute names inside one decoder layer; what a layer doesn't have is a dense FFN."""

    ffn: str = "mlp"
    experts: str = "experts"
    router: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None  # its sigmoid scales the shared expert's output
    residual_scale: str | None = None  # attribute of the layer that scales both parts' outputs
    attention_output: str = "self_attn.o_proj"
    # keys of config.json: how many routed experts, the width of one, of the shared one (and how
    # many that is made of), of a dense FFN
    count_key: str = "num_experts"
    width_key: str = "moe_intermediate_size"
    shared_width_key: str = "moe_intermediate_size"
    shared_count_key: str | None = None
    dense_width_key: str = "intermediate_size"


DEEPSEEK = Family(
    shared="shared_experts", shared_count_key="n_shared_experts", count_key="n_routed_experts"
)
FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        shared_width_key="shared_expert_intermediate_size",
    ),
    "qwen3_moe": Family(),
    "mixtral": Family(width_key="intermediate_size", count_key="num_local_experts"),
    "phimoe": Family(router="router", width_key="intermediate_size", count_key="num_local_experts"),
    "olmoe": Family(width_key="intermediate_size"),
    "deepseek": DEEPSEEK,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "granitemoe": Family(
        ffn="block_sparse_moe",
        router="router",
        residual_scale="residual_multiplier",
        width_key="intermediate_size",
        count_key="num_local_experts",
    ),
    "llama": Family(),
    "qwen3": Family(),
}


def register_family(model_type: str, family: Family) -> None:
    """Declare a model type that transformers knows and the table above does not."""
    FAMILIES[model_type] = family


def family_of(model_type: str) -> Family:
    """The declaration of a model type; refuses, naming the known ones, if there is none."""
    if model_type not in FAMILIES:
        raise CameraError(
            f"model type '{model_type}' is not supported: declare where its experts sit with "
            f"camera.moe.families.register_family, or choose a model of {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
