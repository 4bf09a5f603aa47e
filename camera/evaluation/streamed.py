"""Log-likelihoods of a model that doesn't fit in memory: one read of its layers serves all.

Shapes: B rows of a batch, L columns of a row, T = B * L tokens, H hidden, V vocabulary, P positions
of a batch whose logits are wanted, A tokens whose likelihood is asked, C positions of a chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from camera.evaluation.divergence.meter import TokenObserver
from camera.evaluation.shared_context import MASKABLE, Pack, Rows, packs_of, reach, rows_of
from camera.moe.capture import replaced_submodule, unwrap
from camera.runtime.device.host_memory import free_host_memory
from camera.runtime.device.peak_memory import PeakMemory
from camera.runtime.errors import CameraError
from camera.runtime.mapped import MappedTable
from camera.runtime.progress import each_layer
from camera.streaming.lm_head import HEAD_TABLES, lm_head_loaded, tokens_per_chunk
from camera.streaming.memory import BATCH_TOKENS, HIDDEN_SHARE
from camera.streaming.skeleton import MetaModel

Request = tuple[list[int], list[int]]
"""(context, answer): tokens that are only seen, and those whose likelihood is asked."""
_Asked = tuple[int, list[int], list[int]]  # number, context, answer


@dataclass
class _Batch:
    """Rows that run together; where packed, each token sees its context and its own answer."""

    ids_BL: Tensor
    rows: Rows | None  # None: plain rows, padded on the right if at all
    wanted_P: Tensor  # of the T tokens, those that predict something
    place_A: Tensor  # which of them predicts a token that is asked for,
    target_A: Tensor  # the token,
    owner_A: Tensor  # and its request
    token_A: Tensor  # and which token of the request's answer it is
    first: int = 0  # the batch's first token in the hidden states


class StreamedEvaluation:
    """Answers requests for log-likelihoods while the layers of a model pass by, one in memory.

    `add` enters requests; then `run` reads the layers and answers. Who reads the layers anyway
    calls `begin` first, `layer` for each one while it is loaded, as it then is, and `finish` at the
    end. A context that several answers follow is read once. Peak memory: the largest layer (or
    embedding), one batch, and the hidden states of all tokens, which go to a memory-mapped file in
    `folder` (default: the system's) if they exceed `ram` bytes (default: a share of what is free).
    """

    def __init__(
        self,
        model: MetaModel,
        *,
        batch_tokens: int = BATCH_TOKENS,
        ram: int | None = None,
        folder: Path | None = None,
    ):
        self.model, self.batch_tokens = model, batch_tokens
        self.ram, self.folder = ram, folder
        self.answers: list[tuple[float, bool] | None] = []
        self.sizes: list[int] = []  # tokens of each request
        self.memory = PeakMemory(model.device)
        self.seconds, self.tokens = 0.0, 0  # spent and read by the last pass
        self._observers: dict[int, tuple[TokenObserver, int]] = {}  # with its first token's number
        self._asked: list[_Asked] = []
        self._under_way: list[_Asked] = []
        self._batches: list[_Batch] = []
        self._hidden: MappedTable | None = None

    def add(
        self,
        requests: Sequence[Request],
        longest: int | None = None,
        observer: TokenObserver | None = None,
    ) -> range:
        """Enter requests; the numbers under which `answers` will hold (log p, is it greedy).

        log p is the sum over the answer's tokens of their log-probability, fp32 softmax; greedy is
        whether each is the likeliest. An `observer` sees how the answers' tokens are predicted,
        numbered over all of these requests. With more than `longest` tokens to read the context
        loses its left end. Raises CameraError for a request without context or answer.
        """
        start, seen = len(self.answers), 0
        for number, (context, answer) in enumerate(requests, start):
            if longest is not None:
                context = (context + answer)[-(longest + 1) :][: -len(answer)]
            if not context or not answer:
                raise CameraError(
                    f"a request of {len(context)} and {len(answer)} tokens: it takes a context and "
                    f"an answer, and the answer must be shorter than the model's context"
                )
            self._asked.append((number, context, answer))
            self.sizes.append(len(context) + len(answer))
            if observer is not None:
                self._observers[number] = (observer, seen)
            seen += len(answer)
        self.answers += [None] * len(requests)
        return range(start, len(self.answers))

    def run(self, progress: bool = True) -> None:
        """Read the model once and answer what was added since the last time."""
        if not self._asked:
            return
        model, started = self.model, perf_counter()
        with PeakMemory(model.device) as self.memory:
            self.begin()
            for i in each_layer(0, len(model.layers), "evaluate", self.memory, progress):
                model.load_layer(i)
                self.layer(i)
                model.free_layer(i)
            self.finish()
        self.seconds = perf_counter() - started

    @torch.no_grad()
    def begin(self) -> None:
        """Embed all tokens; what is added from here on waits for the next pass."""
        started, meta = perf_counter(), self.model
        self._under_way, self._asked = self._asked, []
        self._batches = list(self._plan())
        self._recorders = nn.ModuleList(map(meta.recorder, meta.layers))
        size = 0
        for batch in self._batches:
            batch.first, size = size, size + batch.ids_BL.numel()
        ram = HIDDEN_SHARE * free_host_memory() if self.ram is None else self.ram
        self._hidden = MappedTable(
            size, meta.config.get_text_config().hidden_size, meta.dtype, ram, self.folder
        )
        self.tokens, self.seconds = size, 0.0
        meta.load_rest("embed_tokens")
        for batch in self._batches:
            ids_BL = batch.ids_BL.to(meta.device)
            hidden_BLH, _ = self._arguments(batch, 0, input_ids=ids_BL)
            self._hidden.write(batch.first, hidden_BLH)
        meta.free(meta.base.embed_tokens)
        self.seconds += perf_counter() - started

    @torch.no_grad()
    def layer(self, index: int) -> None:
        """Take all tokens through a loaded layer."""
        started, layer = perf_counter(), self.model.layers[index]
        for batch in self._batches:
            hidden_BLH = self._read(batch)
            _, kwargs = self._arguments(batch, index, inputs_embeds=hidden_BLH)
            self._hidden.write(batch.first, unwrap(layer(hidden_BLH, **kwargs)))
        self.seconds += perf_counter() - started

    @torch.no_grad()
    def finish(self) -> None:
        """Final norm and head on the positions that predict something: fills `answers`."""
        started, size = perf_counter(), len(self.answers)
        sums, misses = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.long)
        with lm_head_loaded(self.model) as vocabulary:
            chunk = tokens_per_chunk(vocabulary, tables=HEAD_TABLES if self._observers else 2)
            for batch in self._batches:
                hidden_TH = self._read(batch).flatten(0, 1)
                for begin in range(0, len(batch.wanted_P), chunk):
                    wanted_C = batch.wanted_P[begin : begin + chunk].to(hidden_TH.device)
                    here_A = (batch.place_A >= begin) & (batch.place_A < begin + chunk)
                    place_A, target_A = batch.place_A[here_A] - begin, batch.target_A[here_A]
                    log_CV = self._logits(hidden_TH[wanted_C]).log_softmax(-1, torch.float32)
                    likeliest_C = log_CV.argmax(-1).cpu()
                    log_A = log_CV[place_A.to(log_CV.device), target_A.to(log_CV.device)]
                    owner_A = batch.owner_A[here_A]
                    sums.index_add_(0, owner_A, log_A.cpu().double())
                    misses.index_add_(0, owner_A, (likeliest_C[place_A] != target_A).long())
                    if self._observers:
                        self._show(owner_A, batch.token_A[here_A], place_A, log_CV)
        for number, _, _ in self._under_way:
            self.answers[number] = (sums[number].item(), misses[number].item() == 0)
            self._observers.pop(number, None)
        self._under_way, self._batches, self._hidden = [], [], None
        self.seconds += perf_counter() - started

    def _show(self, owner_A: Tensor, token_A: Tensor, place_A: Tensor, log_CV: Tensor) -> None:
        """Tell the observers of requests how their tokens in a chunk are predicted."""
        for number in owner_A.unique().tolist():
            if number in self._observers:
                (observer, first), own_A = self._observers[number], owner_A == number
                log_AV = log_CV[place_A[own_A].to(log_CV.device)]
                observer.observe(first + token_A[own_A], log_AV)

    def _plan(self) -> Iterator[_Batch]:
        """Rows of like length together; contexts that stand alone need no mask of their own."""
        model = self.model.model
        numbers = [number for number, _, _ in self._under_way]
        requests = [(context, answer) for _, context, answer in self._under_way]
        longest = max(len(context) + len(answer) for context, answer in requests)
        if model.config._attn_implementation not in MASKABLE:
            longest = 0
        packs, alone = packs_of(requests, min(longest, reach(model) or longest))
        plain = [Pack(tuple(requests[i][0]), [(i, requests[i][1])]) for i in alone]
        plain += [pack for pack in packs if len(pack.answers) == 1]
        plain.sort(key=_columns, reverse=True)
        for group in self._split(plain):
            yield _batch(group, None, numbers)
        for group in self._split([pack for pack in packs if len(pack.answers) > 1]):
            yield _batch(group, rows_of(group), numbers)

    def _split(self, packs: list[Pack]) -> Iterator[list[Pack]]:
        batch: list[Pack] = []
        widest = extra = 0
        for pack in packs:
            widest, extra = max(widest, len(pack.context)), max(extra, pack.extra)
            if batch and (len(batch) + 1) * (widest + extra) > self.batch_tokens:
                yield batch
                batch, widest, extra = [], len(pack.context), pack.extra
            batch.append(pack)
        if batch:
            yield batch

    def _read(self, batch: _Batch) -> Tensor:
        hidden_TH = self._hidden.read(batch.first, batch.ids_BL.numel())
        return hidden_TH.view(*batch.ids_BL.shape, -1).to(self.model.device)

    def _arguments(self, batch: _Batch, index: int, **inputs: Tensor) -> tuple[Tensor, dict]:
        """What the model's own forward passes to a layer: hidden states (right for the first layer
        only) and the rest (masks, rotary positions)."""
        base, device, rows = self.model.base, self.model.device, batch.rows
        if rows is not None:
            inputs["attention_mask"] = rows.mask(self.model.dtype, device)
            inputs["position_ids"] = rows.position_BL.to(device)
        with (
            replaced_submodule(base, "layers", self._recorders),
            replaced_submodule(base, self.model.family.final_norm, nn.Identity()),
        ):
            base(**inputs, use_cache=False)
        call = self._recorders[index].call
        for recorder in self._recorders:
            recorder.call = None
        return call

    def _logits(self, hidden_CH: Tensor) -> Tensor:
        """The model's own way from its last layer's output to logits_CV."""
        model, base = self.model.model, self.model.base
        last = nn.ModuleList([self.model.recorder(self.model.layers[0], hidden_CH[:, None])])
        options = {"use_cache": False}
        if hasattr(model.config, "output_router_logits"):
            options["output_router_logits"] = False  # there is no router to ask
        with replaced_submodule(base, "layers", last):
            unused = torch.zeros_like(hidden_CH[:, None])
            return model(inputs_embeds=unused, **options).logits[:, 0]


def _columns(pack: Pack) -> int:
    return len(pack.context) + pack.extra


def _batch(packs: list[Pack], rows: Rows | None, numbers: list[int]) -> _Batch:
    if rows is None:
        ids_BL = torch.zeros(len(packs), max(map(_columns, packs)), dtype=torch.long)
        for row, pack in enumerate(packs):
            ids_BL[row, : _columns(pack)] = torch.tensor([*pack.context, *pack.answers[0][1][:-1]])
    else:
        ids_BL = rows.ids_BL
    wanted, place, target, owner, token = [], [], [], [], []
    for row, pack in enumerate(packs):
        last = len(pack.context) - 1 if rows is None else rows.last
        offset = row * ids_BL.shape[1] + last
        for number, answer, columns in pack.columns():
            place += [len(wanted) + column for column in columns]
            target += answer
            owner += [numbers[number]] * len(answer)
            token += range(len(answer))
        wanted += range(offset, offset + pack.extra + 1)
    return _Batch(ids_BL, rows, *map(torch.tensor, (wanted, place, target, owner, token)))
