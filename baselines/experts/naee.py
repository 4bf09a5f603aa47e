"""NAEE: removes the subset of experts that changes the layer's output least.

https://arxiv.org/abs/2402.14800

Shapes: T tokens of the sample, H hidden, E routed experts, N tokens of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from baselines.experts.base import ExpertPruning
from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.method import LayerPlan, Pass, PassKind, Plan, Propagate
from camera.moe.pool import LayerShape, PoolIndex, layer_seed
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    import torch

    from camera.moe.budget import Budget
    from camera.moe.experts.group import ExpertGroup
    from camera.moe.feed_forward import FeedForward
    from camera.moe.observer import ExpertCall
    from camera.moe.routing import RouterConstraints

CHUNK_BYTES = 2**28  # of the outputs of all experts that are held at once


@dataclass(frozen=True)
class NAEE(ExpertPruning):
    """Not All Experts are Equal: searches the r experts of a layer to remove.

    J(D) = ||Z - Z_D||_F over a sample of tokens, Z the routed output with all experts, Z_D the one
    that the model's own router gives without the experts D (renormalised or not, in groups or not,
    as the model does). Source: NAEE (ACL 2024, arXiv 2402.14800), equations and code; the search
    beyond enumeration is this framework's.

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

    search: Literal["auto", "enumerate", "greedy", "random", "independent"] = "auto"
    max_subsets: int = 5000
    sample_tokens: int = 4096
    norm_tokens: int | None = None
    seed: int = 1234

    def check(self, budget: Budget) -> None:
        from baselines.experts.subset_search import resolve

        if self.max_subsets < 1 or self.sample_tokens < 0 or (self.norm_tokens or 1) < 1:
            raise CameraError(
                f"max_subsets={self.max_subsets} and norm_tokens={self.norm_tokens} must be at "
                f"least 1, sample_tokens={self.sample_tokens} at least 0 (all)."
            )
        super().check(budget)
        count, routing = self.removed(budget), self.routing(budget)
        resolve(self.search, routing.experts, count, routing.groups, self.max_subsets)

    def observer(self) -> OutputSpec:
        return OutputSpec(self.sample_tokens, self.seed)

    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        # a layer's Grams are too large to keep for all layers
        spec = self.observer() if self.native else self.with_outputs(self.observer())
        return (Pass(PassKind.COMPRESSED, spec, feed=propagate),)

    def apply_bytes(self, layer: LayerShape) -> int:
        """The inner products, and four tables of as many candidates as are tried together."""
        from baselines.experts.subset_search import CHUNK, TOGETHER, resolve

        spec, experts, routing = self.observer(), sum(layer.pool.routed), layer.pool.routing
        tokens, how = spec.sampled(layer), self.search
        if how == "auto":
            groups = routing.groups if routing else 1
            how = resolve(how, experts, round(self.sparsity * experts), groups, self.max_subsets)
        one_by_one = how in ("greedy", "independent")
        candidates = experts if one_by_one else min(TOGETHER, self.max_subsets)
        tried = min(max(CHUNK, tokens * experts), tokens * experts * candidates)
        return spec.gram_bytes(layer) + 4 * 4 * tried

    def steps(self, routing: RouterConstraints) -> tuple[int, int]:
        return routing.groups, routing.most  # J asks the router to do without, constants or not

    def plan_layer(
        self, index: int, ffn: FeedForward, seen: LayerStatistics, budget: Budget, plan: Plan
    ) -> LayerPlan:
        import torch

        from baselines.experts.rerouting import Rerouter
        from baselines.experts.subset_search import OutputError, search

        routing, sample = self.routing(budget), getattr(seen, "ranking", seen)
        error = OutputError(sample.gram_TEE, Rerouter(ffn, sample.x_TH), self.norm_tokens)
        spared = self.spared(index, budget)

        def sparing(keep_CE: torch.Tensor) -> torch.Tensor:
            """J, without end where a super expert goes."""
            return error(keep_CE).masked_fill(~keep_CE[:, spared].all(1).cpu(), torch.inf)

        found = search(
            sparing if spared else error,
            routing.experts,
            self.removed(budget),
            groups=routing.groups,
            how=self.search,
            limit=self.max_subsets,
            seed=layer_seed(self.seed, index),
        )
        keep_E = torch.ones(routing.experts, dtype=torch.bool)
        keep_E[found.drop] = False
        self.require_spared(index, keep_E, budget)
        report = {
            "search": found.search,
            "evaluations": found.evaluations,
            "error": found.error,
            "relative_error": found.error / max(error.of_nothing(), 1e-30),
            "tokens": len(sample.x_TH),
        }
        return self.decided(keep_E, seen, report)


@dataclass
class ExpertOutputs(LayerStatistics):
    """Outputs of every routed expert of a layer for a sample of tokens, routed to it or not.

    x_TH are the sampled inputs of the FFN, gram_TEE[t] the inner products of all experts' outputs
    for token t (fp32, on the layer's device); tokens_E counts tokens routed, over the whole pool.
    """

    kind: ClassVar[str] = "expert_outputs"
    travels: ClassVar[bool] = False
    tokens_E: torch.Tensor
    x_TH: torch.Tensor
    gram_TEE: torch.Tensor

    def stored(self) -> ExpertOutputs:
        nothing = self.gram_TEE.new_zeros(0, *self.gram_TEE.shape[1:]).cpu()
        return ExpertOutputs(self.groups, self.tokens_E, self.x_TH[:0].cpu(), nothing)


@dataclass(frozen=True)
class OutputSpec(ObserverSpec):
    """Outputs of all experts on `tokens` sampled tokens (0: all)."""

    statistics: ClassVar[type[ExpertOutputs]] = ExpertOutputs

    tokens: int
    seed: int

    def nbytes(self, layer: LayerShape) -> int:
        """T H: the sample."""
        return self.sampled(layer) * layer.hidden * layer.itemsize

    def result_bytes(self, layer: LayerShape) -> int:
        """4 T E^2 once and, of a chunk of tokens, again; and the outputs of the chunk."""
        experts, tokens = sum(layer.pool.routed), self.sampled(layer)
        outputs = min(CHUNK_BYTES, 4 * tokens * experts * layer.hidden)
        chunk = outputs // (4 * experts * layer.hidden)
        return outputs + self.gram_bytes(layer) + 4 * chunk * experts**2

    def gram_bytes(self, layer: LayerShape) -> int:
        """4 T E^2: what the search reads."""
        return 4 * self.sampled(layer) * sum(layer.pool.routed) ** 2

    def sampled(self, layer: LayerShape) -> int:
        """T: tokens of the sample."""
        return min(self.tokens or layer.tokens, layer.tokens)

    def build(self, index: int, ffn: FeedForward) -> OutputObserver:
        return OutputObserver(ffn, self.tokens, layer_seed(self.seed, index))


class OutputObserver(LayerObserver):
    """Samples tokens of a layer's input, seeded; at the end runs every expert on them, once."""

    def __init__(self, ffn: FeedForward, tokens: int, seed: int):
        import torch

        self.ffn, self.tokens, self._index = ffn, tokens, PoolIndex(ffn)
        self._generator = torch.Generator().manual_seed(seed)
        self._x: list[torch.Tensor] = []
        self._key_T = torch.zeros(0)
        self._tokens = [0] * self._index.experts

    def ffn_input(
        self,
        batch: int,
        x_TH: torch.Tensor,
        hidden_TH: torch.Tensor | None,
        mask_T: torch.Tensor | None,
    ) -> None:
        """Take a batch's tokens into the sample: those of the smallest random keys stay."""
        import torch

        if mask_T is not None:
            x_TH = x_TH[mask_T]
        key_T = torch.cat((self._key_T, torch.rand(len(x_TH), generator=self._generator)))
        if self.tokens and len(key_T) > self.tokens:
            stay = key_T.argsort(stable=True)[: self.tokens].sort().values
            x_TH, key_T = torch.cat((*self._x, x_TH))[stay.to(x_TH.device)], key_T[stay]
            self._x = []
        self._x.append(x_TH)
        self._key_T = key_T

    def __call__(self, call: ExpertCall) -> None:
        self._tokens[self._index.expert(call.group.path, call.expert)] += len(call.x_NH)

    def result(self) -> ExpertOutputs:
        """Run all routed experts on the sample."""
        import torch

        group, x_TH = self.ffn.routed, torch.cat(self._x)
        step = max(1, CHUNK_BYTES // (4 * x_TH.shape[1] * len(group.widths)))
        grams = [_gram(group, x_NH) for x_NH in x_TH.split(step)]
        tokens_E = torch.tensor(self._tokens)
        return ExpertOutputs(self._index.groups, tokens_E, x_TH, torch.cat(grams))


def _gram(group: ExpertGroup, x_NH: torch.Tensor) -> torch.Tensor:
    """Inner products [N, E, E] of what all experts put out for each token, in fp32."""
    import torch

    out_NEH = x_NH.new_empty(len(x_NH), len(group.widths), x_NH.shape[1], dtype=torch.float32)
    for expert in range(len(group.widths)):
        h_NW = group.activations(expert, x_NH).to(x_NH.dtype)
        out_NEH[:, expert] = group.project(expert, h_NW)
    return out_NEH @ out_NEH.transpose(1, 2)
