"""lm-eval's model wrapper, reading a context once for all the answers that are offered after it.

Shapes: B contexts of a batch, L columns of a packed row, V vocabulary, C tokens of an answer.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

MASKABLE = ("sdpa", "eager")  # attention implementations that take a mask of one's own


class Pack(NamedTuple):
    """A context and the answers after it: (number of the request, tokens of the answer)."""

    context: tuple[int, ...]
    answers: list[tuple[int, list[int]]]

    @property
    def extra(self) -> int:
        """Columns after the context: an answer's last token is predicted, never read."""
        return sum(len(answer) - 1 for _, answer in self.answers)


class PackedLM(HFLM):
    """HFLM whose log-likelihoods come from packed rows: context, answer 1, answer 2, ...

    Each answer sees the context and itself, at the positions it would have alone, so the numbers
    are HFLM's own up to rounding; a question of four answers costs its text once instead of four
    times, and no logits are computed inside the context. What doesn't fit the model's context goes
    the way of HFLM, which cuts it on the left.
    """

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        packs, alone = self._packs(requests)
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods") as bar:
            for batch in self._batches(packs):
                answers = self._score(batch)
                found |= answers
                bar.update(len(answers))
        rest = [requests[i] for i in alone]
        if rest:
            scored = super()._loglikelihood_tokens(rest, disable_tqdm=disable_tqdm, **kwargs)
            found |= dict(zip(alone, scored, strict=True))
        return [found[i] for i in range(len(requests))]

    def _packs(self, requests: list) -> tuple[list[Pack], list[int]]:
        groups: dict[tuple[int, ...], Pack] = {}
        alone: list[int] = []
        maskable = self.model.config._attn_implementation in MASKABLE
        for i, (_, context, answer) in enumerate(requests):
            if not maskable or not context or len(context) + len(answer) - 1 > self.max_length:
                alone.append(i)
                continue
            pack = groups.setdefault(tuple(context), Pack(tuple(context), []))
            pack.answers.append((i, answer))
        return sorted(groups.values(), key=lambda p: len(p.context) + p.extra, reverse=True), alone

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
        ids_BL, position_BL, seen_BLL, extra = _rows(batch)
        dtype = next(self.model.parameters()).dtype
        mask = torch.zeros(seen_BLL.shape, dtype=dtype)
        mask.masked_fill_(~seen_BLL, torch.finfo(dtype).min)
        with torch.inference_mode():
            logits_BLV = self.model(
                input_ids=ids_BL.to(self.device),
                attention_mask=mask[:, None].to(self.device),
                position_ids=position_BL.to(self.device),
                use_cache=False,
                logits_to_keep=extra + 1,
            ).logits
        found = {}
        for pack, logits_LV in zip(batch, logits_BLV, strict=True):
            start = 1  # column 0 is the context's last token, which predicts every first token
            for i, answer in pack.answers:
                columns = torch.tensor([0, *range(start, start + len(answer) - 1)])
                start += len(answer) - 1
                answer_C = torch.tensor(answer, device=logits_LV.device)
                found[i] = _likelihood(logits_LV[columns], answer_C, self.softmax_dtype)
        return found


def _rows(batch: list[Pack]) -> tuple[Tensor, Tensor, Tensor, int]:
    """ids_BL, position_BL, seen_BLL (row may look at column) and the columns after the contexts.

    Contexts end in the same column; padding before and after sees only itself.
    """
    widest = max(len(pack.context) for pack in batch)
    extra = max(pack.extra for pack in batch)
    size = (len(batch), widest + extra)
    ids_BL, position_BL = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    seen_BLL = torch.eye(size[1], dtype=torch.bool).repeat(size[0], 1, 1)
    for row, pack in enumerate(batch):
        length = len(pack.context)
        first, column = widest - length, widest
        ids_BL[row, first:widest] = torch.tensor(pack.context)
        position_BL[row, first:widest] = torch.arange(length)
        seen_BLL[row, first:widest, first:widest] = torch.ones(length, length).tril().bool()
        for _, answer in pack.answers:
            read = len(answer) - 1
            end = column + read
            ids_BL[row, column:end] = torch.tensor(answer[:-1], dtype=torch.long)
            position_BL[row, column:end] = torch.arange(length, length + read)
            seen_BLL[row, column:end, first:widest] = True
            seen_BLL[row, column:end, column:end] = torch.ones(read, read).tril().bool()
            column = end
    return ids_BL, position_BL, seen_BLL, extra


def _likelihood(
    logits_CV: Tensor, answer_C: Tensor, dtype: torch.dtype | None
) -> tuple[float, bool]:
    """Log-probability of the answer, and whether each of its tokens is the likeliest."""
    log_CV = torch.log_softmax(logits_CV, dim=-1, dtype=dtype)
    likeliest = bool((log_CV.argmax(-1) == answer_C).all())
    return float(log_CV.gather(1, answer_C[:, None]).sum()), likeliest
