"""The types of the configuration: a wrong key, type or value is refused while Hydra composes it.

Importing this module registers them with Hydra; CONF is here too, for those who compose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from camera.evaluation.tasks.names import NINE_TASKS
from camera.pipeline.model_card import base_name
from camera.runtime.values import renaming
from experiments.config.constructor import choice, typed_settings
from experiments.config.location import CONF, EMBEDDED, EMBEDDED_MODEL, user_path
from experiments.config.started import started

TOKENIZER = "tokenizer.json"
KEY_ERRORS = (ConfigAttributeError, ConfigKeyError)

_group_types: dict[str, dict[str, type]] = {}

Fraction = choice("moe", "model", "routed")
Propagate = choice("compressed", "dense")
Dtype = choice("auto", "float32", "bfloat16", "float16")
Store = choice("bfloat16", "source")
Stream = choice("auto", "always", "never")
Retry = choice("none", "failed")
Corpus = choice("wikitext2", "c4")


@dataclass
class Model:
    """A checkpoint: a folder, a hub id, or the embedded default; data is where its texts are."""

    path: str = MISSING
    name: str = "${model_name:${model.path}}"
    data: str = "${model_data:${model.path}}"


@dataclass
class Speed:
    """Tokens per second against the original; without batch sizes it isn't measured."""

    batch_sizes: list[int] = field(default_factory=list)
    prompt_length: int = 128
    new_tokens: int = 16
    repeats: int = 7


@dataclass
class Generative:
    """Tasks whose answers the model writes: see `camera.evaluation.tasks.generative`."""

    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None
    chat_template: bool = False
    run_code: bool = False


@dataclass
class Evaluation:
    """What is measured: corpora for perplexity, lm-eval tasks, and how much of each.

    `batch_size` is of the tasks; `perplexity_batch_size` is of blocks, whose logits are as long as
    the context and by far the largest tensor there. `stream` says whether the model is read layer
    by layer (`auto`: where it doesn't fit the memory there is), in batches of its own size; else
    `dequantize` trades the memory that packed weights save for speed, which changes no number.
    """

    perplexity: list[Corpus] = field(default_factory=list)
    length: int | None = None
    stride: int | None = None
    blocks: int | None = None
    divergence: int | None = None
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    batch_size: int = 1
    perplexity_batch_size: int = 1
    stream: Stream = Stream.auto
    dequantize: bool = True
    generative: Generative = field(default_factory=Generative)
    speed: Speed = field(default_factory=Speed)


@dataclass
class MemoryUse:
    """Memory choices of a compression: see `camera.streaming.settings.MemoryChoices`."""

    phi: choice("auto", "keep", "routed", "recompute") = "auto"
    hidden: choice("auto", "device", "ram", "disk") = "auto"
    experts: choice("auto", "ram", "disk") = "auto"


@dataclass
class Config:
    """The whole configuration: five groups and the scalars that a study sweeps."""

    model: Model = field(default_factory=Model)
    method: Any = MISSING
    calibration: Any = MISSING
    evaluation: Evaluation = field(default_factory=Evaluation)
    tracker: Any = MISSING
    memory: MemoryUse = field(default_factory=MemoryUse)

    sparsity: float = 0.2
    sparsity_of: Fraction = Fraction.moe
    bits: float = 2.5
    alpha: float = 0.9
    seed: int = 1234
    propagate: Propagate = Propagate.compressed
    data: str = "${model.data}"
    device: str = "auto"
    dtype: Dtype = Dtype.auto
    save_dtype: Dtype = Dtype.auto
    store: Store = Store.bfloat16
    output: str = "outputs"
    force: bool = False
    dry_run: bool = False
    retry: Retry = Retry.none
    keep_checkpoint: bool = True
    objective: str | None = None
    trust_remote_code: bool = False


def model_name(path: str) -> str:
    """The name of a model that no YAML names: the last part of its hub id or path."""
    return "tiny_moe" if path == EMBEDDED else Path(base_name(user_path(path))).absolute().name


def model_data(path: str) -> str:
    """Where the texts of a model come from unless said otherwise.

    A model that has the embedded one's tokenizer was made of it, and knows its texts only.
    """
    if path == EMBEDDED:
        return EMBEDDED
    own, embedded = (Path(user_path(path)) / TOKENIZER, EMBEDDED_MODEL / TOKENIZER)
    same = own.is_file() and own.stat().st_size == embedded.stat().st_size
    return EMBEDDED if same and own.read_bytes() == embedded.read_bytes() else "hub"


def register() -> None:
    """Makes the types known to Hydra: `schema`, and `hydra/types/GROUP/NAME` for each class.

    A method's types are those of its constructor, so that adding one adds nothing here.
    """
    OmegaConf.register_new_resolver("model_name", model_name, replace=True)
    OmegaConf.register_new_resolver("model_data", model_data, replace=True)
    OmegaConf.register_new_resolver("nine_tasks", lambda: list(NINE_TASKS), replace=True)
    OmegaConf.register_new_resolver("user_path", user_path, replace=True)
    OmegaConf.register_new_resolver("started", started, replace=True, use_cache=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for file in sorted(CONF.glob("*/*.yaml")):
        target = OmegaConf.load(file).get("_target_")
        if target:
            group, node = file.parent.name, typed_settings(target)
            store.store(group=f"hydra/types/{group}", name=file.stem, node=node)
            if isinstance(node, type):
                _group_types.setdefault(group, {})[file.stem] = node


def group_types() -> dict[str, dict[str, type]]:
    """By group and choice the typed settings of its class."""
    return _group_types


@contextlib.contextmanager
def naming_valid_keys() -> Iterator[None]:
    """Adds to Hydra's refusal of a key the valid ones, and the new name of an old key or value."""
    try:
        yield
    except SystemExit as exit_:
        refusal = getattr(exit_.__context__, "__cause__", None)
        parent = getattr(refusal, "parent_node", None)
        if told := _renaming(refusal):
            print(told)
        if isinstance(refusal, KEY_ERRORS) and isinstance(parent, DictConfig):
            keys = sorted(str(key) for key in parent if key not in ("hydra", "_target_"))
            print(f"Valid keys here: {', '.join(keys)}" if keys else _without_keys(refusal))
        raise


def _without_keys(refusal: Any) -> str:
    group, _, key = str(refusal.full_key).rpartition(".")
    chosen = getattr(refusal.object_type, "__name__", "what is chosen").lower()
    return f"{group}={chosen} has no settings of its own: leave {group}.{key} out."


def _renaming(refusal: BaseException | None) -> str | None:
    if not isinstance(refusal, OmegaConfBaseException) or not refusal.full_key:
        return None
    group, _, key = refusal.full_key.rpartition(".")
    value = refusal.value if isinstance(refusal, ValidationError) else None
    return renaming(group, key, value)


register()
