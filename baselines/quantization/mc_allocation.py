"""Mixture Compressor's integer program, solved exactly: how many bits each expert of a layer gets.

Shapes: E routed experts, B bit widths in the order they are offered.
"""

from collections.abc import Sequence

import torch

from camera.runtime.errors import CameraError

SCALE = 1000.0  # the released code's, so that objectives can be compared


def expert_costs(
    count_E: torch.Tensor,
    weight_E: torch.Tensor,
    loss_EB: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.5,
    loss_exponent: float = 1.0,
) -> torch.Tensor:
    """c_{e,b} = 1000 (n_e / sum n)^alpha (w_e / sum w)^beta eps_{e,b}^loss_exponent, fp64 [E, B].

    n_e: tokens routed to the expert; w_e: sum of their routing weights; eps_{e,b}: what the layer's
    output loses when this expert alone is rounded to b bits. Source: Mixture Compressor (ICLR
    2025), whose paper says loss_exponent 2 and whose released code computes 1.
    """
    count_E, weight_E = count_E.double(), weight_E.double()
    share_E = (count_E / count_E.sum().clamp(min=1)) ** alpha
    share_E = share_E * (weight_E / weight_E.sum().clamp(min=1e-300)) ** beta
    return SCALE * share_E[:, None] * loss_EB.double() ** loss_exponent


def reachable(experts: int, levels: Sequence[int], at_least_one: Sequence[int]) -> tuple[int, int]:
    """The least and the most bits that a layer's experts can sum up to."""
    forced = list(at_least_one)[:experts]
    rest = experts - len(forced)
    return sum(forced) + rest * min(levels), sum(forced) + rest * max(levels)


class Allocations:
    """Bits by expert that minimise sum_e c_{e, b_e}, s.t. sum_e b_e <= budget, for every budget.

    Every width of `at_least_one` is used at least once (as many of them as there are experts). A
    table over (bits used, which of these were used) answers exactly in O(E * budget * B), the
    budgets up to `most` at once; of equal plans the one that uses fewer bits wins.
    """

    def __init__(
        self,
        cost_EB: torch.Tensor,
        levels: Sequence[int],
        most: int,
        at_least_one: Sequence[int] = (3, 2),
    ):
        self.levels, self.flags = list(levels), list(at_least_one)[: len(cost_EB)]
        self.least, _ = reachable(len(cost_EB), levels, self.flags)
        marks = [1 << self.flags.index(b) if b in self.flags else 0 for b in levels]
        best = torch.full((1 << len(self.flags), most + 1), torch.inf, dtype=torch.float64)
        best[0, 0] = 0.0
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        for row in cost_EB.double().tolist():
            after = torch.full_like(best, torch.inf)
            choice = torch.full(best.shape, -1, dtype=torch.int64)
            origin = torch.zeros(best.shape, dtype=torch.int64)
            for place, (bits, mark) in enumerate(zip(levels, marks, strict=True)):
                if bits > most:
                    continue
                for seen in range(len(best)):
                    to = seen | mark
                    trial = best[seen, : most + 1 - bits] + row[place]
                    better = trial < after[to, bits:]
                    after[to, bits:] = torch.where(better, trial, after[to, bits:])
                    choice[to, bits:] = torch.where(better, place, choice[to, bits:])
                    origin[to, bits:] = torch.where(better, seen, origin[to, bits:])
            self._steps.append((choice, origin))
            best = after
        self._best = best[-1]

    def within(self, budget: int) -> torch.Tensor:
        """Bits by expert, int64 [E]; CameraError if the budget is too small."""
        if budget < self.least:
            raise CameraError(
                f"{budget} bits are too few for {len(self._steps)} experts: the least is "
                f"{self.least} ({', '.join(map(str, self.flags))} bits once or more); raise `bits`."
            )
        used, seen, picked = int(self._best[: budget + 1].argmin()), (1 << len(self.flags)) - 1, []
        for choice, origin in reversed(self._steps):
            place = int(choice[seen, used])
            picked.append(self.levels[place])
            used, seen = used - self.levels[place], int(origin[seen, used])
        return torch.tensor(picked[::-1])
