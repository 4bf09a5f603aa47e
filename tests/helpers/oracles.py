"""Slow, independent ways to compute what the library computes; nothing of camera's code is used.

Shapes: T tokens, H hidden, E experts, I width, K top-k, N micro-experts of a layer.
"""

import torch
from torch.nn import functional as F


def ffn_of(layer):
    names = ("block_sparse_moe", "feed_forward", "mlp")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def decoder_of(model):
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        return model.language_model.model
    return getattr(model.model, "language_model", model.model)


def layers_of(model):
    return decoder_of(model).layers


def shared_of(ffn):
    names = ("shared_expert", "shared_experts", "shared_mlp")
    return next((getattr(ffn, name) for name in names if hasattr(ffn, name)), None)


def capture(model, index, ids, mask=None):
    """FFN input x_TH of one layer and the routing (index_TK, weight_TK) its experts were handed.

    Llama 4 hands its experts their scaled tokens alone: they take the place of the routing.
    """
    seen, ffn = {}, ffn_of(layers_of(model)[index])
    hooks = [ffn.register_forward_pre_hook(lambda _, a: seen.update(x=a[0].flatten(0, 1)))]
    if hasattr(ffn, "experts"):
        hooks.append(
            ffn.experts.register_forward_pre_hook(
                lambda _, a, k: seen.update(handed=(a + tuple(k.values()))), with_kwargs=True
            )
        )
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    handed = seen.get("handed")
    return seen["x"], handed[1:3] if handed and len(handed) > 1 else handed


def split(experts, both):
    """Gate and up of a tensor that holds both along its last axis."""
    if type(experts).__name__ == "GptOssExperts":
        return both[..., ::2], both[..., 1::2]
    return both.chunk(2, -1)


def transposed(experts):
    return type(experts).__name__ in ("AriaExperts", "GptOssExperts", "Llama4TextExperts")


def hidden_of(module, gate, up):
    """The formula of an expert's activation."""
    if type(module).__name__ in ("GptOssExperts", "MiniMaxM3VLExperts"):
        gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
        alpha = getattr(module, "alpha", None) or module.swiglu_alpha
        return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)
    return F.silu(gate) * up


def dense_phi(ffn, x_TH, routing):
    """phi_TN of every micro-expert on every token, all experts computed, times a zero gate."""
    parts, double = [], x_TH.double()
    mlp = shared_of(ffn) if hasattr(ffn, "experts") else ffn
    if mlp is not None:
        gate, up = (F.linear(double, m.weight.double()) for m in (mlp.gate_proj, mlp.up_proj))
        scale = 1.0
        if hasattr(ffn, "shared_expert_gate"):
            scale = torch.sigmoid(F.linear(double, ffn.shared_expert_gate.weight.double()))
        parts.append(scale * F.silu(gate) * up)
    if hasattr(ffn, "experts"):
        experts = ffn.experts.gate_up_proj.shape[0]
        gates_TE = torch.zeros(len(x_TH), experts, dtype=torch.float64)
        inputs = [double] * experts
        if len(routing) == 1:  # Llama 4: each expert's tokens, scaled by their weights
            inputs, gates_TE = routing[0].double().view(experts, *x_TH.shape), gates_TE + 1
        else:
            gates_TE.scatter_(1, routing[0], routing[1].double())
        if type(ffn).__name__ in ("LagunaSparseMoeBlock", "MiniMaxM3VLSparseMoeBlock"):
            gates_TE *= ffn.routed_scaling_factor
        for e in range(experts):
            weight = ffn.experts.gate_up_proj[e].double()
            both = inputs[e] @ (weight if transposed(ffn.experts) else weight.T)
            if hasattr(ffn.experts, "gate_up_proj_bias"):
                both = both + ffn.experts.gate_up_proj_bias[e].double()
            h = hidden_of(ffn.experts, *split(ffn.experts, both))
            parts.append(gates_TE[:, e, None] * h)
    return torch.cat(parts, 1).detach()


def basis(ffn):
    """w_down of every micro-expert as rows, [N, H]."""
    parts = []
    mlp = shared_of(ffn) if hasattr(ffn, "experts") else ffn
    if mlp is not None:
        parts.append(mlp.down_proj.weight.T)
    if hasattr(ffn, "experts"):
        parts += [down if transposed(ffn.experts) else down.T for down in ffn.experts.down_proj]
    return torch.cat(parts).double().detach()


def energies(ffn, x_TH, routing, alpha):
    phi2_TN = dense_phi(ffn, x_TH, routing).square()
    norm_N = basis(ffn).square().sum(1)
    return ((1 - alpha) * phi2_TN.sum(0) + alpha * phi2_TN.amax(0)) * norm_N


def zero_lowest(ffn, energy_N, remove):
    """Prune by zeroing columns of down: function for function what removal does."""
    lowest = torch.argsort(energy_N, stable=True)[:remove]
    start = 0
    mlp = shared_of(ffn) if hasattr(ffn, "experts") else ffn
    with torch.no_grad():
        if mlp is not None:
            width = mlp.down_proj.weight.shape[1]
            mlp.down_proj.weight[:, lowest[lowest < width]] = 0
            start = width
        if hasattr(ffn, "experts"):
            down_EHW = ffn.experts.down_proj
            down_EHW = down_EHW.mT if transposed(ffn.experts) else down_EHW
            width = down_EHW.shape[2]
            for position in lowest[lowest >= start] - start:
                down_EHW[position // width, :, position % width] = 0


def camera_p(model, ids, ratio, alpha):
    """The plain path: run, score, zero, run again from the start, layer after layer."""
    has_experts = any(hasattr(ffn_of(layer), "experts") for layer in layers_of(model))
    for index, layer in enumerate(layers_of(model)):
        ffn = ffn_of(layer)
        if has_experts and not hasattr(ffn, "experts"):
            continue
        x_TH, routing = capture(model, index, ids)
        energy_N = energies(ffn, x_TH, routing, alpha)
        zero_lowest(ffn, energy_N, int(len(energy_N) * ratio))
    return model
