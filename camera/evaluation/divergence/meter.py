"""How far a model's predictions are from the dense model's: KL divergence, agreement, acceptance.

Shapes: T scored tokens of a passage, A of them that are seen at a time, K likeliest tokens of the
dense model that are kept, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from camera.evaluation.passages import Passage, standard_error

NOTHING = -math.inf  # log-probability of what isn't there


class TokenObserver(Protocol):
    """Is told how the scored tokens of a passage are predicted."""

    def observe(self, index_A: Tensor, log_AV: Tensor) -> None:
        """The log-probabilities, fp32, of the scored tokens with these numbers (on the CPU)."""


@dataclass(frozen=True)
class TopTokens:
    """The dense model's distribution at each scored token: its K likeliest tokens, and the rest.

    `log_TK` are their log-probabilities in falling order, `rest_T` is the logarithm of what all
    other tokens have together (-inf where K is the vocabulary); fp32.
    """

    ids_TK: Tensor
    log_TK: Tensor
    rest_T: Tensor
    vocabulary: int

    @property
    def kept(self) -> float:
        """The mean share of the probability that the kept tokens have."""
        return self.log_TK.double().exp().sum(1).mean().item()


class TopRecorder:
    """Keeps the K likeliest tokens of each scored token."""

    def __init__(self, passage: Passage, top: int, vocabulary: int):
        T, K = sum(block.scored for block in passage.blocks), min(top, vocabulary)
        self.found = TopTokens(
            torch.zeros(T, K, dtype=torch.int32),
            torch.full((T, K), math.nan),
            torch.full((T,), math.nan),
            vocabulary,
        )

    def observe(self, index_A: Tensor, log_AV: Tensor) -> None:
        log_AK, ids_AK = log_AV.topk(self.found.ids_TK.shape[1], dim=-1)
        self.found.ids_TK[index_A] = ids_AK.to("cpu", torch.int32)
        self.found.log_TK[index_A] = log_AK.cpu()
        self.found.rest_T[index_A] = _rest(log_AV, ids_AK).cpu()


class DivergenceMeter:
    """Compares a model's predictions with the dense model's, token by token, summed by block."""

    def __init__(self, passage: Passage, dense: TopTokens):
        self.dense = dense
        self._scored = [block.scored for block in passage.blocks]
        self._block_T = torch.arange(len(self._scored)).repeat_interleave(
            torch.tensor(self._scored)
        )
        self._sums = {name: torch.zeros(len(self._scored)).double() for name in MEASURES}

    def observe(self, index_A: Tensor, log_AV: Tensor) -> None:
        dense, device = self.dense, log_AV.device
        found = compared(
            dense.ids_TK[index_A].to(device).long(),
            dense.log_TK[index_A].to(device),
            dense.rest_T[index_A].to(device),
            log_AV,
        )
        for name, values_A in zip(MEASURES, found, strict=True):
            self._sums[name].index_add_(0, self._block_T[index_A], values_A.cpu().double())

    def result(self) -> dict[str, Any]:
        """`kl`, `agreement` and `acceptance`, means over the scored tokens, each with its standard
        error over the blocks (`_stderr`, None for one block) and its mean in each (`_per_block`);
        of the dense model's distribution how many tokens were kept (`top`) of how many
        (`vocabulary`), and the share of the probability that they have on average (`kept`)."""
        found: dict[str, Any] = {}
        for name, sums in self._sums.items():
            per_block = sums.tolist()
            found[name] = sum(per_block) / sum(self._scored)
            found[f"{name}_stderr"] = standard_error(per_block, self._scored)
            found[f"{name}_per_block"] = [
                value / count for value, count in zip(per_block, self._scored, strict=True)
            ]
        top, vocabulary = self.dense.ids_TK.shape[1], self.dense.vocabulary
        return found | {"top": top, "vocabulary": vocabulary, "kept": self.dense.kept}


MEASURES = ("kl", "agreement", "acceptance")


def compared(
    ids_AK: Tensor, log_AK: Tensor, rest_A: Tensor, log_AV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl_A, agreement_A, acceptance_A) of a model's log_AV with the dense model's distribution.

    All tokens beyond the K are one outcome, "the rest". Σ p log(p / q) over these K + 1 outcomes is
    at most that over the vocabulary (log-sum inequality), Σ min(p, q) at least; both are exact
    where K is the vocabulary. Agreement is 1 where no token is likelier than the dense model's
    likeliest, so a tie agrees.
    """
    near_AK = log_AV.gather(1, ids_AK)
    p_AO = _normalised(torch.cat([log_AK, rest_A[:, None]], 1))
    q_AO = _normalised(torch.cat([near_AK, _rest(log_AV, ids_AK)[:, None]], 1))
    share_AO = p_AO.exp()
    kl_A = (share_AO * (p_AO - q_AO)).masked_fill(p_AO == NOTHING, 0.0).sum(1)
    agreement_A = near_AK[:, 0] >= log_AV.amax(1)
    return kl_A, agreement_A, torch.minimum(share_AO, q_AO.exp()).sum(1)


def _normalised(log_AO: Tensor) -> Tensor:
    """In fp64, summing to 1 as fp32 log-probabilities don't quite."""
    log_AO = log_AO.double()
    return log_AO - log_AO.logsumexp(1, keepdim=True)


def _rest(log_AV: Tensor, ids_AK: Tensor) -> Tensor:
    """The logarithm of the probability of all tokens but these."""
    return log_AV.scatter(1, ids_AK, NOTHING).logsumexp(1)
