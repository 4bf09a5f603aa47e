"""Decisions of a router without some of its experts, without building a smaller router.

Shapes: T tokens, C candidates (sets of experts that stay), E routed experts, K experts per token.
"""

import copy

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError


class Rerouter:
    """A layer's own router, run from logits in which removed experts have -inf.

    A smaller router's logits are the full one's without the dropped rows, so the matrix product is
    done once for all candidates; everything after it (softmax or sigmoid, groups, sparsemixer,
    top-k, renormalisation) is the model's code. Raises CameraError for a router whose decision
    isn't a function of its logits.
    """

    def __init__(self, ffn: FeedForward, x_TH: torch.Tensor):
        router = getattr(ffn.module, ffn.family.router)
        logits_TE = router(x_TH)[0]
        narrow_TE = logits_TE.to(x_TH.dtype)  # some routers return an fp32 copy of 16-bit logits
        self.logits_TE = narrow_TE if torch.equal(narrow_TE.to(logits_TE), logits_TE) else logits_TE
        self._router = copy.deepcopy(router)
        self._added = ffn.family.added_to_scores
        if hasattr(router, "hidden_dim"):  # by which it flattens its input: now the logits
            self._router.hidden_dim = logits_TE.shape[-1]
        logits_NE, weight_NK, index_NK = router(x_TH[:64])
        own_NE = gates(weight_NK, index_NK, logits_NE.shape[-1])
        if not torch.equal(own_NE, self._run(logits_NE.to(self.logits_TE.dtype))):
            raise CameraError(
                f"the router {type(router).__name__} doesn't decide by its logits alone: routing "
                "without some of its experts can't be foretold."
            )

    def __call__(self, keep_CE: torch.Tensor) -> torch.Tensor:
        """gates_TCE: the weight of every expert for every token, 0 where not chosen, fp32."""
        keep_CE = keep_CE.to(self.logits_TE.device)
        logits_TCE = self.logits_TE[:, None].masked_fill(~keep_CE, float("-inf"))
        return self._run(logits_TCE.flatten(0, 1), keep_CE).view(logits_TCE.shape)

    def _run(self, logits_NE: torch.Tensor, keep_CE: torch.Tensor | None = None) -> torch.Tensor:
        added_E = getattr(self._router, self._added, None) if self._added else None
        if added_E is not None and keep_CE is not None:
            added_CE = added_E.masked_fill(~keep_CE, float("-inf"))
            added_NE = added_CE.repeat(len(logits_NE) // len(keep_CE), 1)
            setattr(self._router, self._added, added_NE)
        try:
            with _GivenLogits():
                _, weight_NK, index_NK = self._router(logits_NE)
        finally:
            if added_E is not None:
                setattr(self._router, self._added, added_E)
        return gates(weight_NK, index_NK, logits_NE.shape[-1])


def gates(weight_NK: torch.Tensor, index_NK: torch.Tensor, experts: int) -> torch.Tensor:
    """Routing as a matrix [N, E] in fp32: an expert's weight, 0 where it was not chosen."""
    gates_NE = weight_NK.new_zeros((len(weight_NK), experts), dtype=torch.float32)
    return gates_NE.scatter_(1, index_NK, weight_NK.float())


class _GivenLogits(TorchFunctionMode):
    """Inside, a linear layer returns its input: the router is handed what it would compute."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            return args[0]
        return func(*args, **(kwargs or {}))
