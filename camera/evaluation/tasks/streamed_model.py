"""lm-eval's model wrapper around layers that are read one by one."""

import copy
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from camera.evaluation.streamed import StreamedEvaluation
from camera.evaluation.tasks.evaluate import refuse_nan
from camera.evaluation.tasks.requests import CheckedRequests
from camera.runtime.errors import CameraError


class StreamedLM(CheckedRequests, HFLM):
    """HFLM whose log-likelihoods come from one pass over layers that are read one by one.

    It encodes and cuts requests as HFLM does and gives its numbers, with a softmax in fp32, up to
    rounding. What was asked before the pass (`ask`) is answered from it; what wasn't starts a pass
    of its own.
    """

    def __init__(
        self,
        evaluation: StreamedEvaluation,
        tokenizer,
        *,
        max_length: int | None = None,
        progress: bool = True,
    ):
        # HFLM wants the model for its config alone, and gives a tokenizer a pad token: so a copy.
        model, tokenizer = evaluation.model.model, copy.deepcopy(tokenizer)
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length)
        self.evaluation, self.progress = evaluation, progress
        self._numbers: dict[tuple, int] = {}

    def ask(self, requests: Sequence) -> None:
        """Enter requests into the evaluation."""
        fresh = list({request.args: request for request in requests}.values())
        numbers = super().loglikelihood(fresh, disable_tqdm=True)
        self._numbers |= dict(zip((request.args for request in fresh), numbers, strict=True))

    def number(self, request) -> int:
        """The number under which the evaluation knows a request that was asked."""
        return self._numbers[request.args]

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        """(log-likelihood, is it greedy) of each request, as lm-eval wants them."""
        fresh = [request for request in requests if request.args not in self._numbers]
        if fresh:
            self.ask(fresh)
            self.evaluation.run(progress=self.progress and not disable_tqdm)
        answers = [self.evaluation.answers[self.number(request)] for request in requests]
        return refuse_nan(requests, answers)

    def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[int]:
        """Takes what HFLM encoded; the numbers of the requests stand in for their answers."""
        self.check(requests)
        encoded = [(context, answer) for _, context, answer in requests]
        return list(self.evaluation.add(encoded, self.max_length))

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        raise CameraError("evaluation.stream: only tasks of multiple choice can be streamed.")

    generate_until = loglikelihood_rolling
