"""lm-eval's model wrapper, reading a context once for all the answers that are offered after it.

Shapes: B contexts of a batch, L columns of a packed row, V vocabulary, C tokens of an answer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from camera.evaluation.shared_context import MASKABLE, Pack, packs_of, reach, rows_of
from camera.evaluation.tasks.requests import CheckedRequests
from camera.runtime.progress import progress_bar


class PackedLM(CheckedRequests, HFLM):
    """HFLM whose log-likelihoods come from packed rows: context, answer 1, answer 2, ...

    Each answer sees the context and itself, at the positions it would have alone, so the numbers
    are HFLM's own up to rounding; a question of four answers costs its text once instead of four
    times, and no logits are computed inside the context. What doesn't fit the model's context, or
    its attention's reach, goes the way of HFLM, which cuts it on the left.
    """

    show_progress = True

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        self.check(requests)
        packs, alone = self._packs(requests)
        found: dict[int, tuple[float, bool]] = {}
        answers = len(requests) - len(alone)
        with progress_bar(
            "log-likelihoods", answers, "answers", show=self.show_progress
        ) as advance:
            for batch in self._batches(packs):
                scored = self._score(batch)
                found |= scored
                advance(len(scored))
        rest = [requests[i] for i in alone]
        if rest:
            scored = super()._loglikelihood_tokens(rest, disable_tqdm=disable_tqdm, **kwargs)
            found |= dict(zip(alone, scored, strict=True))
        return [found[i] for i in range(len(requests))]

    def _packs(self, requests: list) -> tuple[list[Pack], list[int]]:
        if self.model.config._attn_implementation not in MASKABLE:
            return [], list(range(len(requests)))
        longest = min(self.max_length, reach(self.model) or self.max_length)
        return packs_of([(context, answer) for _, context, answer in requests], longest)

    def _batches(self, packs: list[Pack]) -> Iterator[list[Pack]]:
        """As many answers at once as the batch size allows, at least one context."""
        batch: list[Pack] = []
        answers = 0
        for pack in packs:
            if batch and answers + len(pack.answers) > self.batch_size:
                yield batch
                batch, answers = [], 0
            batch.append(pack)
            answers += len(pack.answers)
        if batch:
            yield batch

    def _score(self, batch: list[Pack]) -> dict[int, tuple[float, bool]]:
        rows = rows_of(batch)
        with torch.inference_mode():
            logits_BLV = self.model(
                input_ids=rows.ids_BL.to(self.device),
                attention_mask=rows.mask(next(self.model.parameters()).dtype, self.device),
                position_ids=rows.position_BL.to(self.device),
                use_cache=False,
                logits_to_keep=rows.ids_BL.shape[1] - rows.last,
            ).logits
        found = {}
        for pack, logits_LV in zip(batch, logits_BLV, strict=True):
            for i, answer, columns in pack.columns():
                answer_C = torch.tensor(answer, device=logits_LV.device)
                found[i] = _likelihood(logits_LV[columns], answer_C, self.softmax_dtype)
        return found


def _likelihood(
    logits_CV: Tensor, answer_C: Tensor, dtype: torch.dtype | None
) -> tuple[float, bool]:
    """Log-probability of the answer, and whether each of its tokens is the likeliest."""
    log_CV = torch.log_softmax(logits_CV, dim=-1, dtype=dtype)
    likeliest = bool((log_CV.argmax(-1) == answer_C).all())
    return float(log_CV.gather(1, answer_C[:, None]).sum()), likeliest
