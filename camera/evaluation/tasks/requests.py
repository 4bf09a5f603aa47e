"""What a language model can't be asked about a task's row, refused before any of it is run."""

from collections.abc import Sequence
from typing import Any

from camera.calibration.windows import require_own_tokens
from camera.evaluation.tasks.names import KEY
from camera.runtime.errors import CameraError

Encoded = tuple[Any, list[int], list[int]]
"""(texts, context, answer) as lm-eval hands requests to its wrappers."""


class CheckedRequests:
    """To stand before lm-eval's HFLM: `check` names task and row of requests that can't be run.

    lm-eval itself meets them one by one with a bare assertion.
    """

    _instances: Sequence[Any] = ()

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        """lm-eval's, which encodes the requests and hands them on in their order."""
        self._instances = requests
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._instances = ()

    def check(self, encoded: Sequence[Encoded]) -> None:
        """CameraError for a blank question, an answer without tokens or longer than the context,
        and tokens of another model."""
        if not self._instances:
            return
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for instance, (_, context, answer) in zip(self._instances, encoded, strict=True):
            row = f"{KEY}: row {instance.doc_id} of {instance.task_name}"
            if not context or not answer:
                what = "no answer" if context else "a blank question"
                raise CameraError(f"{row} has {what}: fix the row, or leave the task out.")
            if len(answer) > self.max_length:
                raise CameraError(
                    f"{row} has an answer of {len(answer)} tokens, and the model's context holds "
                    f"{self.max_length}: leave the task out."
                )
            require_own_tokens(max(*context, *answer), vocabulary)
