"""Decisions of a router without some of its experts, without building a smaller router.

Shapes: T tokens, C candidates (sets of experts that stay), E routed experts, K experts per token.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from camera.moe.feed_forward import FeedForward
from camera.moe.routing import gates, routed, router_of
from camera.runtime.errors import CameraError


class Rerouter:
    """A layer's own router, run from logits in which removed experts have -inf.

    A smaller router's logits are the full one's without the dropped rows, so the matrix product is
    done once for all candidates; everything after it (softmax or sigmoid, groups, sparsemixer,
    top-k, renormalisation) is the model's code. Raises CameraError for a router whose decision
    isn't a function of its logits.
    """

    def __init__(self, ffn: FeedForward, x_TH: torch.Tensor):
        router, names = router_of(ffn), ffn.family.block_rows
        logits_TE = routed(ffn, x_TH)[0]
        narrow_TE = logits_TE.to(x_TH.dtype)  # some routers return an fp32 copy of 16-bit logits
        self.logits_TE = narrow_TE if torch.equal(narrow_TE.to(logits_TE), logits_TE) else logits_TE
        self._router, self._router_input = copy.deepcopy(router), ffn.family.router_input
        self._arguments = {name: getattr(ffn.module, name, None) for name in names}
        self._added = _Added(self._router, self._arguments, ffn.family.added_to_scores)
        if hasattr(router, "hidden_dim"):  # by which it flattens its input: now the logits
            self._router.hidden_dim = logits_TE.shape[-1]
        logits_NE, weight_NK, index_NK = routed(ffn, x_TH[:64])
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
        added_E = self._added.value
        if added_E is not None and keep_CE is not None:
            added_CE = added_E.masked_fill(~keep_CE, float("-inf"))
            self._added.value = added_CE.repeat(len(logits_NE) // len(keep_CE), 1)
        try:
            with _GivenLogits():
                _, weight_NK, index_NK = self._router(
                    self._router_input(logits_NE), *self._arguments.values()
                )
        finally:
            self._added.value = added_E
        return gates(weight_NK, index_NK, logits_NE.shape[-1])


class _Added:
    """What a router adds to its scores before it chooses: an argument, or a tensor inside it."""

    def __init__(self, router: nn.Module, arguments: dict[str, Any], path: str | None):
        *parents, self._name = (path or "").split(".")
        self._arguments = arguments
        self._module = dict(router.named_modules()).get(".".join(parents))
        held = getattr(self._module, self._name, None)
        if isinstance(held, nn.Parameter):  # of a copy, which is never trained
            delattr(self._module, self._name)
            self._module.register_buffer(self._name, held.detach())

    @property
    def value(self) -> torch.Tensor | None:
        if self._name in self._arguments:
            return self._arguments[self._name]
        return getattr(self._module, self._name, None)

    @value.setter
    def value(self, added: torch.Tensor | None) -> None:
        if self._name in self._arguments:
            self._arguments[self._name] = added
        elif added is not None:
            setattr(self._module, self._name, added)


class _GivenLogits(TorchFunctionMode):
    """Inside, a linear layer returns its input: the router is handed what it would compute."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            return args[0]
        return func(*args, **(kwargs or {}))
