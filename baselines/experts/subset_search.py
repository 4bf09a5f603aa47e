"""Search for the subset of a layer's experts to remove, on cached expert outputs.

Pure functions of tensors. Shapes: T tokens, E routed experts, C candidates (sets of kept experts,
bool [C, E]), R = E - dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice, product
from math import comb

import torch

from camera.runtime.errors import CameraError

SEARCHES = ("auto", "enumerate", "greedy", "random", "independent")
TOGETHER = 4096  # sets that are made at a time
CHUNK = 2**22  # numbers of one intermediate tensor: candidates are evaluated so many at a time

Route = Callable[[torch.Tensor], torch.Tensor]
"""route(keep_CE) -> gates_TCE: the routing weights if only these experts were there."""


class OutputError:
    """J of any set of experts, without running one: expert outputs enter by their inner products.

    Z_t = sum_e g_te * O_te, so Z_t - Z_t(C) = sum_e d_te * O_te with d = g - g(C), and its square
    is d_t^T G_t d_t with the Gram matrices G_t = O_t O_t^T [E, E], whatever the hidden size.

    J(C) = sum over blocks of `norm_tokens` tokens of ||Z - Z(C)||_F; without, one block of all
    (Frobenius norm over the sample). The NAEE reference has one norm per calibration batch.
    """

    def __init__(self, gram_TEE: torch.Tensor, route: Route, norm_tokens: int | None = None):
        self.gram_TEE, self.route = gram_TEE, route
        self.tokens, self.experts = gram_TEE.shape[:2]
        self.norm_tokens = norm_tokens or max(self.tokens, 1)
        everyone = torch.ones(1, self.experts, dtype=torch.bool, device=gram_TEE.device)
        self.gates_T1E = route(everyone)
        self.evaluations = 0

    def __call__(self, keep_CE: torch.Tensor) -> torch.Tensor:
        """J, fp64 [C] on the CPU."""
        keep_CE = keep_CE.to(self.gram_TEE.device)
        step = max(1, CHUNK // max(1, self.tokens * self.experts))
        parts = [self._norms(self.route(part) - self.gates_T1E) for part in keep_CE.split(step)]
        self.evaluations += len(keep_CE)
        return torch.cat(parts).cpu().double()

    def of_nothing(self) -> float:
        """J of dropping every expert: the norm of the routed output itself, for comparison."""
        return self._norms(self.gates_T1E).item()

    def _norms(self, delta_TCE: torch.Tensor) -> torch.Tensor:
        square_TC = ((delta_TCE @ self.gram_TEE) * delta_TCE).sum(-1).clamp(min=0)
        double = torch.float32 if square_TC.device.type == "mps" else torch.float64
        blocks = [b.sum(0, dtype=double).sqrt() for b in square_TC.split(self.norm_tokens)]
        return torch.stack(blocks).sum(0)


@dataclass(frozen=True)
class Found:
    """The set a search chose."""

    drop: list[int]
    error: float  # J
    search: str
    evaluations: int


def search(
    error: Callable[[torch.Tensor], torch.Tensor],
    experts: int,
    drop: int,
    *,
    groups: int = 1,
    how: str = "auto",
    limit: int = 5000,
    seed: int = 0,
) -> Found:
    """The set of `drop` experts with the smallest error found; the same number from each group.

    `how` is enumerate (all sets; CameraError if more than `limit`), greedy (backward elimination of
    the expert with the smallest error), independent (the experts with the smallest errors when
    removed alone), random (the best of `limit` drawn sets) or auto (enumerate up to `limit`, else
    greedy). Of equals the first in order of index wins. `error` is J of candidates [C, E], [C].
    """
    how = resolve(how, experts, drop, groups, limit)
    places = _Places(experts, groups)
    if how == "greedy":
        keep_E, best, evaluations = _greedy(error, places, drop)
    elif how == "independent":
        keep_E, best, evaluations = _independent(error, places, drop)
    else:
        sets = places.all(drop) if how == "enumerate" else places.drawn(drop, limit, seed)
        keep_E, best, evaluations = _best(error, sets)
    return Found((~keep_E).nonzero().flatten().tolist(), best, how, evaluations)


def resolve(how: str, experts: int, drop: int, groups: int = 1, limit: int = 5000) -> str:
    """The search that `how` comes to; CameraError for an unknown one or too long an enumeration."""
    if how not in SEARCHES:
        raise CameraError(f"search={how} is none of {', '.join(SEARCHES)}.")
    sets = comb(experts // groups, drop // groups) ** groups
    if how == "enumerate" and sets > limit:
        raise CameraError(
            f"search=enumerate would try {float(sets):.3g} sets of {drop} out of {experts} experts "
            f"in every layer, more than max_subsets={limit}: use search=greedy or raise "
            "max_subsets."
        )
    if how == "auto":
        return "enumerate" if sets <= limit else "greedy"
    if how == "random" and sets <= limit:
        return "enumerate"  # drawing would only repeat some
    return how


class _Places:
    """Experts in groups of equal size, and sets that take equally many of each."""

    def __init__(self, experts: int, groups: int):
        self.experts, self.groups, self.size = experts, groups, experts // groups

    def all(self, drop: int) -> Iterator[torch.Tensor]:
        """Every set, as chunks of candidates, in the order of `itertools.combinations`."""
        starts = range(0, self.experts, self.size)
        choices = [combinations(range(s, s + self.size), drop // self.groups) for s in starts]
        sets = product(*choices)
        while chunk := list(islice(sets, TOGETHER)):
            drops = [[expert for part in parts for expert in part] for parts in chunk]
            yield self.without(torch.tensor(drops).view(len(chunk), drop))

    def drawn(self, drop: int, number: int, seed: int) -> Iterator[torch.Tensor]:
        """So many random sets."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.rand(number, self.groups, self.size, generator=generator)
        lowest = keys.argsort(-1)[..., : drop // self.groups]
        drops = lowest + torch.arange(0, self.experts, self.size)[:, None]
        yield self.without(drops.flatten(1))

    def without(self, drops_CN: torch.Tensor) -> torch.Tensor:
        """Candidates [C, E] that lack these experts."""
        keep_CE = torch.ones(len(drops_CN), self.experts, dtype=torch.bool)
        return keep_CE.scatter_(1, drops_CN, False)


def _best(error, sets: Iterator[torch.Tensor]) -> tuple[torch.Tensor, float, int]:
    keep_E, least, evaluations = None, float("inf"), 0
    for keep_CE in sets:
        J_C = error(keep_CE)
        evaluations += len(J_C)
        first = _first_least(J_C)
        if keep_E is None or J_C[first] < least:
            keep_E, least = keep_CE[first], J_C[first].item()
    return keep_E, least, evaluations


def _greedy(error, places: _Places, drop: int) -> tuple[torch.Tensor, float, int]:
    keep_E = torch.ones(places.experts, dtype=torch.bool)
    group_E = torch.arange(places.experts) // places.size
    least, evaluations = 0.0, 0
    open_G = torch.ones(places.groups, dtype=torch.bool)
    for _ in range(drop):
        if not open_G.any():  # every group has lost one: the next round
            open_G[:] = True
        going = (keep_E & open_G[group_E]).nonzero()
        keep_CE = keep_E.repeat(len(going), 1).scatter_(1, going, False)
        J_C = error(keep_CE)
        first = _first_least(J_C)
        keep_E, least = keep_CE[first], J_C[first].item()
        evaluations += len(J_C)
        open_G[group_E[going[first, 0]]] = False
    return keep_E, least, evaluations


def _independent(error, places: _Places, drop: int) -> tuple[torch.Tensor, float, int]:
    alone_E = error(places.without(torch.arange(places.experts)[:, None]))
    keep_E = keep_best(alone_E, drop, places.groups)
    return keep_E, error(keep_E[None]).item(), places.experts + 1


def keep_best(score_E: torch.Tensor, drop: int, groups: int = 1) -> torch.Tensor:
    """bool [E]: all but the `drop` lowest, equally many of each group; of equals the first goes."""
    score_GE = score_E.view(groups, -1)
    lowest = torch.argsort(score_GE, dim=1, stable=True)[:, : drop // groups]
    return torch.ones_like(score_GE, dtype=torch.bool).scatter_(1, lowest, False).flatten()


def _first_least(J_C: torch.Tensor) -> int:
    return int(torch.argsort(J_C, stable=True)[0])
