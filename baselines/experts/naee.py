"""NAEE: the set of experts whose loss changes a layer's output least goes.

Shapes: T tokens of the sample, H hidden, E routed experts, N tokens of one expert.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from baselines.experts.base import ExpertPruning
from baselines.experts.rerouting import Rerouter
from baselines.experts.subset_search import OutputError, resolve, search
from camera.calibration.statistics import LayerStatistics
from camera.method import Outcome
from camera.moe.budget import Budget
from camera.moe.feed_forward import ExpertGroup, FeedForward
from camera.moe.routing import routing_of
from camera.runtime.errors import CameraError

CHUNK_BYTES = 2**28  # of the outputs of all experts that are held at once


@dataclass
class NAEE(ExpertPruning):
    """Not All Experts are Equal: searches the r experts of a layer to drop.

    J(D) = ||Z - Z_D||_F over a sample of tokens, Z the routed output with all experts, Z_D the one
    that the model's own router gives when the experts D are gone (renormalised or not, in groups or
    not, as the model does). Source: NAEE (ACL 2024), equations and code; the search beyond
    enumeration is this framework's.

    `search` is enumerate | greedy | random | independent | auto (enumerate where there are at most
    `max_subsets` sets, else greedy). `sample_tokens` are sampled per layer (0: all), each of which
    costs the output of every expert once and 4 * E^2 bytes for the time of the search.
    `norm_tokens` splits them into blocks with one norm each, added up: the reference's J has blocks
    of one batch, 8 x 2048 tokens (null: one norm).

    With the framework's propagate=dense, layers are searched independently on the original model's
    activations: the reference's `layerwise` mode, its default. With propagate=compressed (the
    default for all methods here) a layer's input comes from the pruned layers before it. The
    reference's `progressive` mode does so too but compares with the output that the layer had in
    the original model; here Z is the layer's output on the input it now gets, so that J is the
    damage of this layer's own loss.
    """

    name: ClassVar[str] = "naee"
    calibrates: ClassVar[bool] = True
    storable: ClassVar[bool] = False

    search: Literal["auto", "enumerate", "greedy", "random", "independent"] = "auto"
    max_subsets: int = 5000
    sample_tokens: int = 4096
    norm_tokens: int | None = None
    seed: int = 1234

    def check(self, budget: Budget) -> None:
        if self.max_subsets < 1 or self.sample_tokens < 0 or (self.norm_tokens or 1) < 1:
            raise CameraError(
                f"max_subsets={self.max_subsets} and norm_tokens={self.norm_tokens} must be at "
                f"least 1, sample_tokens={self.sample_tokens} at least 0 (all)."
            )
        drop, routing = self.dropped(budget), self.routing(budget)
        resolve(self.search, routing.experts, drop, routing.groups, self.max_subsets)

    def statistics_key(self) -> dict:
        return {"kind": ExpertOutputs.kind, "tokens": self.sample_tokens, "seed": self.seed}

    def observer(self, index: int, ffn: FeedForward) -> "OutputObserver":
        return OutputObserver(ffn, self.sample_tokens, self.seed * 100_003 + index)

    def compress(
        self, index: int, ffn: FeedForward, seen: LayerStatistics | None, budget: Budget
    ) -> Outcome:
        routing, drop = routing_of(ffn), self.dropped(budget)
        error = OutputError(seen.gram_TEE, Rerouter(ffn, seen.x_TH), self.norm_tokens)
        found = search(
            error,
            routing.experts,
            drop,
            groups=routing.groups,
            how=self.search,
            limit=self.max_subsets,
            seed=self.seed * 100_003 + index,
        )
        keep_E = torch.ones(routing.experts, dtype=torch.bool)
        keep_E[found.drop] = False
        return self.drop(
            ffn,
            keep_E,
            search=found.search,
            evaluations=found.evaluations,
            error=found.error,
            relative_error=found.error / max(error.of_nothing(), 1e-30),
            tokens=len(seen.x_TH),
        )


@dataclass
class ExpertOutputs(LayerStatistics):
    """What every routed expert of a layer puts out for a sample of tokens, routed to it or not.

    x_TH are the sampled inputs of the FFN, gram_TEE[t] the inner products of all experts' outputs
    for token t (fp32, on the layer's device); tokens_E counts tokens routed, over the whole pool.
    """

    kind: ClassVar[str] = "expert_outputs"
    travels: ClassVar[bool] = False
    tokens_E: torch.Tensor
    x_TH: torch.Tensor
    gram_TEE: torch.Tensor

    def stored(self) -> "ExpertOutputs":
        nothing = self.gram_TEE.new_zeros(0, *self.gram_TEE.shape[1:]).cpu()
        return ExpertOutputs(self.groups, self.tokens_E, self.x_TH[:0].cpu(), nothing)


class OutputObserver:
    """Samples tokens of a layer's input, seeded; at the end runs every expert on them, once."""

    def __init__(self, ffn: FeedForward, tokens: int, seed: int):
        self.ffn, self.tokens = ffn, tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._x: list[torch.Tensor] = []
        self._key_T = torch.zeros(0)
        self._tokens = {group.path: [0] * len(group.widths) for group in ffn.groups}

    def begin(self, x_TH: torch.Tensor, mask_T: torch.Tensor | None = None) -> None:
        """Take a batch's tokens into the sample: those of the smallest random keys stay."""
        x_TH = x_TH.reshape(-1, x_TH.shape[-1])
        if mask_T is not None:
            x_TH = x_TH[mask_T]
        key_T = torch.cat((self._key_T, torch.rand(len(x_TH), generator=self._generator)))
        if self.tokens and len(key_T) > self.tokens:
            stay = key_T.argsort(stable=True)[: self.tokens].sort().values
            x_TH, key_T = torch.cat((*self._x, x_TH))[stay.to(x_TH.device)], key_T[stay]
            self._x = []
        self._x.append(x_TH)
        self._key_T = key_T

    def __call__(
        self,
        group: ExpertGroup,
        expert: int,
        x_NH: torch.Tensor,
        h_NW: torch.Tensor,
        a_N: torch.Tensor | None,
    ) -> None:
        self._tokens[group.path][expert] += len(x_NH)

    def result(self) -> ExpertOutputs:
        """Run all routed experts on the sample."""
        group = next(group for group in self.ffn.groups if group.routed)
        x_TH = torch.cat(self._x)
        step = max(1, CHUNK_BYTES // (4 * x_TH.shape[1] * len(group.widths)))
        grams = [_gram(group, x_NH) for x_NH in x_TH.split(step)]
        tokens = [n for counts in self._tokens.values() for n in counts]
        groups = {group.path: list(group.widths) for group in self.ffn.groups}
        return ExpertOutputs(groups, torch.tensor(tokens), x_TH, torch.cat(grams))


def _gram(group: ExpertGroup, x_NH: torch.Tensor) -> torch.Tensor:
    """Inner products [N, E, E] of what all experts put out for each token, in fp32."""
    out_NEH = x_NH.new_empty(len(x_NH), len(group.widths), x_NH.shape[1], dtype=torch.float32)
    for expert in range(len(group.widths)):
        h_NW = group.activations(expert, x_NH).to(x_NH.dtype)
        out_NEH[:, expert] = group.project(expert, h_NW)
    return out_NEH @ out_NEH.transpose(1, 2)
