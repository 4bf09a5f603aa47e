"""The pool of a layer: its micro-experts in order, and those that are kept.

Shapes: N micro-experts of a layer's pool.
"""

from dataclasses import dataclass

import torch

from camera.moe.feed_forward import FeedForward
from camera.moe.routing import RouterConstraints


@dataclass
class LayerPool:
    """Micro-experts of one layer that may be removed."""

    widths: list[int]  # of every expert, in pool order
    routed: list[bool]
    routing: RouterConstraints | None = None  # None where no expert can be removed

    def removable(self, only_routed: bool, min_width: int, multiple: int) -> float:
        """The largest share of the candidates that may go."""
        pairs = zip(self.widths, self.routed, strict=True)
        widths = [width for width, routed in pairs if routed or not only_routed]
        # an expert keeps whole blocks of `multiple`, as camera.pruning.ranking cuts them
        kept = [min(width, -(-min(width, min_width) // multiple) * multiple) for width in widths]
        return 1 - sum(kept) / sum(widths) if sum(widths) else 0.0


Kept = dict[str, list[torch.Tensor]]
"""By module path and expert: the sorted rows of the micro-experts that stay."""


def kept_rows(ffn: FeedForward, keep_N: torch.Tensor) -> Kept:
    """A plan (bool, pool order) as row indices per expert."""
    rows = iter(part.nonzero().squeeze(1) for part in keep_N.cpu().split(ffn.widths))
    return {group.path: [next(rows) for _ in group.widths] for group in ffn.groups}
