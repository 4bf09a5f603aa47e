"""The slots that tokens take at a router, by expert.

Shapes: T tokens, K experts per token, S = T * K slots, E experts.
"""

from collections.abc import Iterator

import torch


def sorted_slots(expert_S: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of slots by expert (stable), and where each expert's end in it, [E]; never waits.

    Slots of numbers from E on come last, and are nobody's.
    """
    sorted_S, order_S = expert_S.sort(stable=True)
    number_E = torch.arange(experts, dtype=expert_S.dtype, device=expert_S.device)
    return order_S, torch.searchsorted(sorted_S, number_E, right=True)


def counts_of(end_E: torch.Tensor) -> list[int]:
    """How many slots each expert has, from their ends; waits for the device once."""
    ends = end_E.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def routed_slots(index_TK: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (expert, slots) for the experts that were hit; slot // K is the token."""
    order_S, end_E = sorted_slots(index_TK.reshape(-1), experts)
    for expert, slots in enumerate(order_S.split(counts_of(end_E))):
        if len(slots):
            yield expert, slots
