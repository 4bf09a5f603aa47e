"""What quantising does to a model: compared where codes can't be.

A Hessian summed in another order rounds some codes otherwise, each of which moves all later columns
of its row and the inputs of all later layers; how many differ says nothing of what they cost.
"""

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def damage(folder, source) -> float:
    """Distance of a checkpoint's logits from those of its source, relative to the latter."""
    ids_NL = torch.randint(3, 250, (16, 32), generator=torch.Generator().manual_seed(0))
    got, want = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids_NL).logits
        for path in (folder, source)
    )
    return ((got - want).norm() / want.norm()).item()
