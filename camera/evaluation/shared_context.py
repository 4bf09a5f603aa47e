"""Packed rows: a context, then every answer that is offered after it, each blind to the others.

Shapes: B contexts of a batch, L columns of a row.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASKABLE = ("sdpa", "eager")  # attention implementations that take a mask of one's own
PADDING = -1


class Pack(NamedTuple):
    """A context and the answers after it: (number of the request, tokens of the answer)."""

    context: tuple[int, ...]
    answers: list[tuple[int, list[int]]]

    @property
    def extra(self) -> int:
        """Columns after the context: an answer's last token is predicted, never read."""
        return sum(len(answer) - 1 for _, answer in self.answers)

    def columns(self) -> Iterator[tuple[int, list[int], list[int]]]:
        """(request, answer, columns that predict its tokens), from the context's last, column 0."""
        start = 1
        for i, answer in self.answers:
            end = start + len(answer) - 1
            yield i, answer, [0, *range(start, end)]
            start = end


class Rows(NamedTuple):
    """Packs as rows of a batch; the contexts end in column `last`, padding is at both ends.

    `segment_BL` is 0 in a context, 1, 2, ... in its answers, PADDING elsewhere; `position_BL` is
    what the token's position would be if its answer stood alone after the context.
    """

    ids_BL: Tensor
    position_BL: Tensor
    segment_BL: Tensor
    last: int

    def mask(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """What is added to the attention scores, [B, 1, L, L]: 0 where a row may look at a column.

        A token sees its context and the earlier tokens of its own answer. Padding sees something
        too, as a softmax over nothing is NaN, and no row reads padding.
        """
        position_BL, segment_BL = self.position_BL.to(device), self.segment_BL.to(device)
        seen_BLL = position_BL[:, None, :] <= position_BL[:, :, None]
        seen_BLL &= (segment_BL == 0)[:, None, :] | (
            segment_BL[:, None, :] == segment_BL[:, :, None]
        )
        mask_BLL = torch.zeros(seen_BLL.shape, dtype=dtype, device=device)
        return mask_BLL.masked_fill_(~seen_BLL, torch.finfo(dtype).min)[:, None]


def packs_of(requests: Sequence[tuple[Any, list[int]]], longest: int) -> tuple[list[Pack], list]:
    """Requests (context, answer) by their context, longest first; and the numbers of those that
    can't be packed: without a context, or with more than `longest` tokens to read."""
    groups: dict[tuple[int, ...], Pack] = {}
    alone: list[int] = []
    for i, (context, answer) in enumerate(requests):
        if not context or len(context) + len(answer) - 1 > longest:
            alone.append(i)
            continue
        pack = groups.setdefault(tuple(context), Pack(tuple(context), []))
        pack.answers.append((i, answer))
    return sorted(groups.values(), key=lambda p: len(p.context) + p.extra, reverse=True), alone


def rows_of(batch: Sequence[Pack]) -> Rows:
    """The rows of a batch of packs."""
    widest = max(len(pack.context) for pack in batch)
    size = (len(batch), widest + max(pack.extra for pack in batch))
    ids_BL, position_BL = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    segment_BL = torch.full(size, PADDING)
    for row, pack in enumerate(batch):
        length, read = len(pack.context), [answer[:-1] for _, answer in pack.answers]
        filled = slice(widest - length, widest + pack.extra)
        ids_BL[row, filled] = torch.tensor([*pack.context, *(t for part in read for t in part)])
        position_BL[row, filled] = torch.cat(
            [torch.arange(length), *(torch.arange(length, length + len(part)) for part in read)]
        )
        segments = torch.tensor([0, *range(1, len(read) + 1)])
        sizes = torch.tensor([length, *map(len, read)])
        segment_BL[row, filled] = segments.repeat_interleave(sizes)
    return Rows(ids_BL, position_BL, segment_BL, widest - 1)


def reach(model) -> int | None:
    """How far back attention looks where a model limits it, as a mask of one's own would undo that
    limit; None where it sees its whole context."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((limit for limit in limits if limit), default=None)
