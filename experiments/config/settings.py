"""The settings of one run, resolved from the configuration and checked before anything is read."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from camera.calibration.corpora import check_corpus, find_corpus
from camera.calibration.settings import Calibration, check_calibration
from camera.checkpoint.source import resolve_model
from camera.runtime.errors import CameraError
from camera.runtime.files import CheckpointFiles
from camera.streaming.settings import MemoryChoices
from experiments.config.constructor import build, locate
from experiments.config.location import EMBEDDED, EMBEDDED_MODEL, user_path
from experiments.tiny_moe.layout import ensure_world

if TYPE_CHECKING:
    from camera.evaluation.suite import EvaluationRequest


@dataclass(frozen=True)
class Settings:
    """What one run is asked to do: plain values, each group a dict of its keys."""

    model: dict[str, Any]
    method: dict[str, Any]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    tracker: dict[str, Any]
    memory: dict[str, str]
    sparsity: float
    sparsity_of: str
    bits: float
    alpha: float
    seed: int
    propagate: str
    data: str
    device: str
    dtype: str
    save_dtype: str
    store: str
    output: str
    force: bool
    dry_run: bool
    retry: str
    keep_checkpoint: bool
    objective: str | None
    trust_remote_code: bool

    @classmethod
    def of(cls, config: DictConfig) -> Settings:
        """The settings of a composed configuration; CameraError for a key that has no meaning."""
        known = list(cls.__dataclass_fields__)
        for key in config:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}" if near else f"the keys are {', '.join(known)}"
                raise CameraError(f"{key} is not a key of the configuration; {hint}.")
        found = cls(**OmegaConf.to_container(config, resolve=True, enum_to_str=True))
        model = found.model | {"path": user_path(found.model["path"])}
        return replace(
            found, model=model, data=user_path(found.data), output=user_path(found.output)
        )

    @property
    def model_path(self) -> str:
        """The folder or hub id of the model, the embedded one resolved."""
        path = self.model["path"]
        return str(EMBEDDED_MODEL) if path == EMBEDDED else path

    @property
    def method_name(self) -> str:
        return getattr(locate(self.method["_target_"]), "name", self.method["_target_"])

    @property
    def calibrates(self) -> bool:
        return build(self.method).reads_text

    @property
    def compresses(self) -> bool:
        return getattr(locate(self.method["_target_"]), "compresses", True)

    def texts(self) -> str:
        """`hub` or the folder of the texts; the embedded world is written there at first use."""
        if self.data != EMBEDDED:
            return self.data
        return str(ensure_world(Path(self.output) / "data"))

    @property
    def divergence(self) -> int | None:
        """How many tokens of the dense model are compared; None where it isn't known.

        That is so where a checkpoint is only measured that is compressed itself: it would be
        compared with itself.
        """
        top = self.evaluation.get("divergence")
        if top is None or self.compresses:
            return top
        model = resolve_model(self.model_path, weights=False)
        content = json.loads((model / "config.json").read_text(encoding="utf-8"))
        quantised = content.get("quantization_config") or {}
        is_native = quantised.get("quant_method") != "camera"
        return top if is_native and not (model / CheckpointFiles.REPORT).exists() else None

    def measures(self) -> EvaluationRequest:
        """The texts and tasks that are asked for, and how much of each."""
        from camera.evaluation.suite import EvaluationRequest

        asked = self.evaluation
        sizes = (asked[key] for key in ("length", "stride", "blocks", "limit"))
        return EvaluationRequest(
            self.texts(),
            asked["perplexity"],
            asked["tasks"],
            *sizes,
            self.seed,
            divergence=self.divergence,
        )

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, for the tracker and the run's folder."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__}


def check(settings: Settings) -> None:
    """Refuse values that can't work and files that aren't there, before any weight is read.

    Raises CameraError that names the key and the fix.
    """
    check_values(settings)
    check_machine(settings)


def check_values(settings: Settings) -> None:
    """Refuse values that can't work on any machine."""
    method, evaluation = settings.method, settings.evaluation
    sparsity, alpha = method.get("sparsity"), method.get("alpha")
    if sparsity is not None and not 0 < sparsity < 1:
        raise CameraError(
            f"sparsity={sparsity:g} must lie between 0 and 1{_meant(sparsity)}; "
            "method=dense removes nothing."
        )
    if alpha is not None and not 0 <= alpha <= 1:
        raise CameraError(f"alpha={alpha} must lie in [0, 1].")
    if settings.seed < 0:
        raise CameraError(f"seed={settings.seed} must not be negative.")
    sizes = ("length", "stride", "blocks", "divergence", "limit")
    for key in (*sizes, "batch_size", "perplexity_batch_size"):
        value, least = evaluation.get(key), 2 if key == "length" else 1
        if value is not None and value < least:
            raise CameraError(f"evaluation.{key}={value} must be at least {least}.")
    _check_generative_values(evaluation.get("generative") or {}, evaluation["stream"])
    MemoryChoices(**settings.memory)
    build(settings.tracker)
    build(method)


def _check_generative_values(asked: dict[str, Any], stream: str) -> None:
    for key in ("limit", "batch_size", "max_new_tokens"):
        if asked.get(key) is not None and asked[key] < 1:
            raise CameraError(f"evaluation.generative.{key}={asked[key]} must be at least 1.")
    if asked.get("tasks") and stream == "always":
        raise CameraError(
            "evaluation.generative.tasks: a model that is read layer by layer can't write answers; "
            "set evaluation.stream=auto on a machine that holds it, or leave these tasks out."
        )


def check_machine(settings: Settings) -> None:
    """Refuse a device, a model, texts or tasks that aren't to be had here."""
    from camera.runtime.device.accelerator import resolve_device

    resolve_device(settings.device)
    resolve_model(settings.model_path, weights=False)
    _check_texts(settings)


def _check_texts(settings: Settings) -> None:
    corpora, tasks = settings.evaluation["perplexity"], settings.evaluation["tasks"]
    if settings.calibrates:
        calibration = Calibration(**arguments(settings.calibration))
        check_calibration(calibration, data=settings.texts())
    if settings.evaluation["speed"]["batch_sizes"]:
        corpora = [*corpora, "wikitext2"]  # its prompts
    for corpus in corpora:
        check_corpus(settings.texts(), corpus, find_corpus(corpus).evaluated, key="evaluation")
    if tasks:
        from camera.evaluation.tasks.evaluate import check_tasks

        check_tasks(tasks, data=settings.texts())
    _check_generative(settings)


def _check_generative(settings: Settings) -> None:
    asked = settings.evaluation.get("generative") or {}
    if not asked.get("tasks"):
        return
    from camera.checkpoint.loading import load_tokenizer
    from camera.evaluation.tasks.generative import check_generative, require_template

    check_generative(asked["tasks"], data=settings.texts(), run_code=asked["run_code"])
    if asked["chat_template"]:
        folder = resolve_model(settings.model_path, weights=False)
        require_template(load_tokenizer(folder, settings.trust_remote_code))


def _meant(sparsity: float) -> str:
    return f": {sparsity:g} % is sparsity={sparsity / 100:g}" if 1 < sparsity < 100 else ""


def arguments(group: dict[str, Any]) -> dict[str, Any]:
    """A group's keys without the class that they are for."""
    return {key: value for key, value in group.items() if key != "_target_"}
