"""A transformers model in which constants stand in the place of experts; no code of camera's.

Shapes: T tokens, K experts per token, E experts, H hidden, R replaced.
"""

from copy import deepcopy

import torch

from tests.helpers.oracles import ffn_of, layers_of


@torch.no_grad()
def replace_by_constants(model, layers):
    """Silence the experts {layer: (experts, constants_RH)}, and add weight * constant instead."""
    for index, (gone, constants_RH) in layers.items():
        experts = ffn_of(layers_of(model)[index]).experts
        for name in ("down_proj", "down_proj_bias"):
            if hasattr(experts, name):
                getattr(experts, name)[gone] = 0
        table_EH = experts.down_proj.new_zeros(len(experts.down_proj), constants_RH.shape[1])
        table_EH[gone] = constants_RH.to(table_EH)

        def add(_, arguments, keywords, y_TH, table_EH=table_EH):
            _, index_TK, weight_TK = [*arguments, *keywords.values()][:3]
            return y_TH + (weight_TK[..., None] * table_EH[index_TK]).sum(1).to(y_TH)

        experts.register_forward_hook(add, with_kwargs=True)
    return model


@torch.no_grad()
def outputs_of(experts, x_TH):
    """f_e(x) of every expert on every token, fp64 [T, E, H]: each is given all tokens alone."""
    exact, weight_T1 = deepcopy(experts).double(), torch.ones(len(x_TH), 1, dtype=torch.float64)
    exact.config._experts_implementation = "eager"
    found = [
        exact(x_TH.double(), torch.full((len(x_TH), 1), expert), weight_T1)
        for expert in range(len(experts.down_proj))
    ]
    return torch.stack(found, 1)


def weights_of(routing, experts):
    """a_te of every expert, 0 where it isn't chosen, fp64 [T, E]."""
    index_TK, weight_TK = routing
    a_TE = torch.zeros(len(index_TK), experts, dtype=torch.float64)
    return a_TE.scatter_(1, index_TK, weight_TK.double().detach())
