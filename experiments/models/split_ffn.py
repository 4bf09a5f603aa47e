"""A dense Llama's FFNs split into experts: a real language model with real routing, in minutes.

`python -m experiments.models.split_ffn DENSE OUT` writes OUT as a qwen2_moe checkpoint. It needs no
data and no training: the model generates the text on which its micro-experts are measured. In each
layer those of the largest output become the shared expert; the others are clustered by their
activity into experts of equal size; the router is a ridge regression of each expert's output norm
on the hidden states; the output weights are refitted to the output of the dense FFN. The router's
logits are small, so that all selected experts have the same weight, and the output weights
compensate for that weight.

The output of experts that aren't selected for a token is lost: the result is an object to
experiment on, not a better model.

Shapes: N texts, L tokens of one, T tokens of all, H hidden size, I width of the dense FFN, E routed
experts, F width of one.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from camera.checkpoint.source import resolve_model
from camera.evaluation.placement import require_fit
from camera.runtime.device.host_memory import free_host_memory
from camera.runtime.errors import CameraError
from camera.runtime.progress import format_bytes

ROUTER_SCALE = 0.01  # spread of the logits: chosen experts' weights differ by about a percent
ROUTER_RIDGE = 0.01  # of the hidden states' mean energy
REFIT_RIDGE = 0.1  # of a micro-expert's mean output energy
CLUSTERING_ROUNDS = 10


@torch.no_grad()
def own_text(model: torch.nn.Module, samples: int, length: int, seed: int) -> Tensor:
    """Token ids (samples, length) that the model writes when nothing is asked of it."""
    torch.manual_seed(seed)
    start_N1 = torch.full((samples, 1), model.config.bos_token_id)
    return model.generate(
        start_N1,
        attention_mask=torch.ones_like(start_N1),
        do_sample=True,
        top_k=0,
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
    )


@torch.no_grad()
def watch(model: torch.nn.Module, ids_NL: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Each FFN's input (T, H) and intermediate activations (T, I) over all tokens."""
    inputs: list[list[Tensor]] = [[] for _ in model.model.layers]
    phis: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = []
    for layer, x_list, phi_list in zip(model.model.layers, inputs, phis, strict=True):
        mlp = layer.mlp
        hooks += [
            mlp.register_forward_pre_hook(lambda _, a, to=x_list: to.append(a[0].flatten(0, 1))),
            mlp.down_proj.register_forward_pre_hook(
                lambda _, a, to=phi_list: to.append(a[0].flatten(0, 1))
            ),
        ]
    for ids in ids_NL.split(batch):
        model.model(ids)
    for hook in hooks:
        hook.remove()
    return [(torch.cat(x), torch.cat(phi)) for x, phi in zip(inputs, phis, strict=True)]


def balanced_clusters(features_IT: Tensor, count: int) -> Tensor:
    """Micro-experts (count, I / count) in clusters of equal size: k-means with an assignment.

    Rows of `features_IT` have unit norm; centres start at micro-experts far from each other.
    """
    first = features_IT.sum(0)
    centres_ET = features_IT[[int((features_IT @ first).argmax())]]
    for _ in range(count - 1):
        nearest_I = (features_IT @ centres_ET.T).amax(1)
        centres_ET = torch.cat([centres_ET, features_IT[[int(nearest_I.argmin())]]])
    size = len(features_IT) // count
    for _ in range(CLUSTERING_ROUNDS):
        likeness_IE = features_IT @ centres_ET.T
        seats = likeness_IE.repeat_interleave(size, 1).numpy()
        seat_I = torch.from_numpy(np.asarray(linear_sum_assignment(seats, maximize=True)[1]))
        members_EF = (seat_I // size).argsort(stable=True).view(count, size)
        centres_ET = torch.nn.functional.normalize(features_IT[members_EF].mean(1), dim=1)
    return members_EF


def router_weight(x_TH: Tensor, norm_TE: Tensor) -> Tensor:
    """Ridge regression (E, H) of the experts' output norms on the hidden states."""
    target_TE = norm_TE / norm_TE.mean(1, keepdim=True) - 1
    gram_HH = x_TH.T @ x_TH
    gram_HH.diagonal().add_(ROUTER_RIDGE * gram_HH.diagonal().mean())
    weight_HE = torch.linalg.solve(gram_HH, x_TH.T @ target_TE)
    return (ROUTER_SCALE * weight_HE / (x_TH @ weight_HE).std()).T


def moe_config(dense: object, shared: int, experts: int, active: int) -> Qwen2MoeConfig:
    """The configuration of the split model; refuses widths that don't divide."""
    width = dense.intermediate_size - shared
    if width <= 0 or width % experts:
        raise SystemExit(
            f"error: {dense.intermediate_size} micro-experts less {shared} shared ones don't make "
            f"{experts} equal experts: choose --shared or --experts so that they do."
        )
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
    kept += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    kept += ("rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    kept += ("bos_token_id", "eos_token_id", "pad_token_id")
    return Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in kept},
        shared_expert_intermediate_size=shared,
        moe_intermediate_size=width // experts,
        num_experts=experts,
        num_experts_per_tok=active,
        norm_topk_prob=True,
        qkv_bias=False,
    )


def refitted(phi_TI: Tensor, down_HI: Tensor, sent_TI: Tensor) -> Tensor:
    """Output weights (H, I) that come closest to the dense FFN with what tokens are sent to.

    Least squares over all micro-experts at once: each token's error counts relative to its output,
    each weight's change relative to the weight's size.
    """
    y_TH = phi_TI @ down_HI.T
    weight_T1 = 1 / y_TH.norm(dim=1, keepdim=True).clamp(min=torch.finfo(y_TH.dtype).tiny)
    size_I = down_HI.norm(dim=0)
    sent_phi_TI = phi_TI * sent_TI
    missing_TH = (y_TH - sent_phi_TI @ down_HI.T) * weight_T1
    phi_TI = sent_phi_TI * size_I * weight_T1
    gram_II = phi_TI.T @ phi_TI
    gram_II.diagonal().add_(REFIT_RIDGE * gram_II.diagonal().mean())
    change_IH = torch.linalg.solve(gram_II, phi_TI.T @ missing_TH)
    return down_HI + (change_IH * size_I[:, None]).T


def split_layer(mlp: torch.nn.Module, x_TH: Tensor, phi_TI: Tensor, config: Qwen2MoeConfig) -> dict:
    """The state of the sparse block that stands in for a dense FFN."""
    gate_IH, up_IH, down_HI = (
        getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down")
    )
    experts, active = config.num_experts, config.num_experts_per_tok
    share_TI = torch.nn.functional.normalize(phi_TI.abs() * down_HI.norm(dim=0), dim=1)
    order_I = share_TI.square().sum(0).argsort(descending=True)
    shared = config.shared_expert_intermediate_size
    rest = order_I[shared:]
    active_IT = torch.nn.functional.normalize(share_TI[:, rest].T, dim=1)
    members_EF = rest[balanced_clusters(active_IT, experts)]
    router_EH = router_weight(x_TH, share_TI[:, members_EF].square().sum(2).sqrt())

    chosen_TE = torch.zeros(len(x_TH), experts)
    chosen_TE.scatter_(1, (x_TH @ router_EH.T).topk(active, dim=1).indices, 1.0)
    sent_TI = torch.ones_like(phi_TI)
    sent_TI[:, members_EF.flatten()] = chosen_TE.repeat_interleave(members_EF.shape[1], 1)
    down_HI = refitted(phi_TI, down_HI, sent_TI)
    always = order_I[:shared]
    return {
        "gate.weight": router_EH,
        "experts.gate_up_proj": torch.cat([gate_IH[members_EF], up_IH[members_EF]], 1),
        # a chosen expert's weight is 1 / active, the shared gate's sigmoid(0) is 1 / 2
        "experts.down_proj": down_HI[:, members_EF].movedim(0, 1) * active,
        "shared_expert.gate_proj.weight": gate_IH[always],
        "shared_expert.up_proj.weight": up_IH[always],
        "shared_expert.down_proj.weight": down_HI[:, always] * 2,
        "shared_expert_gate.weight": torch.zeros(1, config.hidden_size),
    }


@torch.no_grad()
def split(
    model: torch.nn.Module, ids_NL: Tensor, shared: int, experts: int, active: int
) -> Qwen2MoeForCausalLM:
    """A qwen2_moe model of a Llama's weights.

    Args:
        ids_NL: token ids, on which micro-experts are watched.
        shared: micro-experts of the shared expert; the others are split evenly.
        experts, active: routed experts, and how many of them a token is sent to.
    """
    config = moe_config(model.config, shared, experts, active)
    state = {key: w for key, w in model.state_dict().items() if ".mlp." not in key}
    watched = watch(model, ids_NL, batch=4)
    for index, layer in enumerate(tqdm(model.model.layers, "layers split")):
        block = split_layer(layer.mlp, *watched[index], config)
        state |= {f"model.layers.{index}.mlp.{name}": w for name, w in block.items()}
        watched[index] = None
    moe = Qwen2MoeForCausalLM(config)
    moe.load_state_dict(state, strict=True)
    return moe


def require_memory(model: torch.nn.Module, tokens: int) -> None:
    """CameraError where the machine can't hold what is watched and the split model."""
    config = model.config
    watched = (
        4 * tokens * config.num_hidden_layers * (config.hidden_size + config.intermediate_size)
    )
    split_model = 4 * model.num_parameters()
    free = free_host_memory()
    if watched + split_model > free:
        raise CameraError(
            f"splitting takes {format_bytes(watched + split_model)} of memory, where "
            f"{format_bytes(free)} are free; {format_bytes(watched)} of it are activations: lower "
            "--samples or --length."
        )


def main() -> None:
    """Load, let the model write, split, save in bf16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", help="folder or hub name of a Llama")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--shared", type=int, default=384, help="width of the shared expert")
    parser.add_argument("--experts", type=int, default=18, help="routed experts")
    parser.add_argument("--active", type=int, default=12, help="routed experts of a token")
    parser.add_argument("--samples", type=int, default=64, help="texts the model writes")
    parser.add_argument("--length", type=int, default=256, help="tokens of one")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.out.exists():
        raise SystemExit(f"error: {given.out} exists already: delete it or choose another.")
    folder = resolve_model(given.dense)
    require_fit(folder, "cpu", "float32", "splitting", "it takes a machine with more memory")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if model.config.model_type != "llama":
        raise SystemExit(
            f"error: {given.dense} is of type {model.config.model_type}: only a llama can be split."
        )
    require_memory(model, given.samples * given.length)
    ids_NL = own_text(model, given.samples, given.length, given.seed)
    moe = split(model, ids_NL, given.shared, given.experts, given.active)
    moe.to(torch.bfloat16).save_pretrained(given.out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(given.out)
    print(f"{given.out}: use it with model=smollm2_135m model.path={given.out}")


if __name__ == "__main__":
    try:
        main()
    except CameraError as error:
        raise SystemExit(f"error: {error}") from error
