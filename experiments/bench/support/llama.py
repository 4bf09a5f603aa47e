"""llama.cpp in this process: a GGUF file is loaded, decodes, and tells its perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from camera.runtime.errors import CameraError

CONTEXT = 512
SURE = 100.0  # added to a logit, it makes its token the one that is sampled


def server(path: Path, threads: int, context: int = CONTEXT) -> Any:
    """llama.cpp with a model; CameraError where it isn't installed."""
    try:
        xllamacpp = import_module("xllamacpp")
    except ImportError as error:
        raise CameraError("this benchmark runs llama.cpp: pip install xllamacpp.") from error
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = context, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def tokens_per_second(server: Any, tokens: int) -> float:
    """Of decoding so many tokens after a prompt of four."""
    asked = {"prompt": [1, 2, 3, 4], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = server.handle_completions(asked | {"cache_prompt": False})
    return answer["timings"]["predicted_per_second"]


def perplexity(server: Any, ids: Sequence[int]) -> float:
    """exp of the mean of -log p over all tokens of a text but the first.

    The next token is asked for after every beginning of the text. It is made sure that the text's
    own comes, whose log-probability is that before anything was added to its logit.
    """
    nll = 0.0
    for end in range(1, len(ids)):
        asked = {"prompt": list(ids[:end]), "max_tokens": 1, "temperature": 0, "logprobs": 1}
        answer = server.handle_completions(asked | {"logit_bias": {str(ids[end]): SURE}})
        (told,) = answer["choices"][0]["logprobs"]["content"]
        if told["id"] != ids[end]:
            raise CameraError(f"llama.cpp took token {told['id']} and not {ids[end]}.")
        nll -= told["logprob"]
    return math.exp(nll / (len(ids) - 1))
