"""The functions of the library: compress a model, apply a plan, describe a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from camera.method import METHODS, Method, Plan, Propagate
from camera.runtime.errors import CameraError
from camera.runtime.values import renaming, seed_of

if TYPE_CHECKING:
    from camera.calibration.settings import Calibration
    from camera.evaluation.suite import EvaluationRequest
    from camera.pipeline.context import CompressionListener
    from camera.pipeline.result import CompressionResult
    from camera.streaming.settings import MemoryChoices

Store = Literal["bfloat16", "source"]


def compress(
    model: str | Path,
    method: Method | str,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    propagate: Propagate = "compressed",
    data: str = "hub",
    seed: int = 1234,
    device: str = "auto",
    dtype: str = "auto",
    save_dtype: str = "auto",
    store: Store = "bfloat16",
    statistics: str | Path | None = None,
    memory: MemoryChoices | None = None,
    measures: EvaluationRequest | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    progress: bool = True,
    listener: CompressionListener | None = None,
    **settings: Any,
) -> CompressionResult:
    """Compress a model, one layer in memory at a time, into the folder `out`.

    `method` is a method or the name of one, which then takes `settings` (`sparsity=0.4`, ...).
    With `propagate="compressed"` each layer is measured on the output of the compressed layers
    before it; with `"dense"` on the original model's activations, in one pass that is kept in the
    folder `statistics` and serves every other alpha and sparsity (methods that rank all layers
    together or need gradients always do that). `memory` says what is kept in RAM. `measures` are
    evaluated on the way, while a layer is in memory, and stand in evaluation.json (not where a
    killed run goes on). `dtype` is what is computed in; the checkpoint has the dtype of the
    original unless `save_dtype` names another. Of a source that is stored quantised, all is written
    unpacked, or with `store="source"` what nobody changed as it was stored. `name` is what model
    card and report call the base model (default: its hub id, or the name of its folder). `progress`
    shows a bar, or where there is no terminal a line a minute in the log (logger `camera`, level
    INFO); `listener` is told of each layer as it is done. Raises CameraError for what a user can
    fix; `out` appears only when it is complete.
    """
    method = as_method(method, settings)
    options = dict(calibration=calibration, propagate=propagate, data=data, seed=seed)
    options |= dict(device=device, dtype=dtype, save_dtype=save_dtype, store=store)
    options |= dict(statistics=statistics, memory=memory, name=name, measures=measures)
    options |= dict(progress=progress, trust_remote_code=trust_remote_code)
    return _run(model, method, out, None, **options, listener=listener)


def apply(
    model: str | Path,
    plan: Plan | str | Path,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    propagate: Propagate = "compressed",
    data: str = "hub",
    seed: int = 1234,
    device: str = "auto",
    dtype: str = "auto",
    save_dtype: str = "auto",
    store: Store = "bfloat16",
    memory: MemoryChoices | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    progress: bool = True,
) -> CompressionResult:
    """Apply a plan that was made before (plan.safetensors, or the checkpoint beside it).

    Nothing is decided anew: text is read only where applying needs it (Hessians, a refit). The
    other arguments are those of `compress`. Raises CameraError where plan and model don't fit.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    method = as_method(plan.method, plan.settings)
    options = dict(calibration=calibration, propagate=propagate, data=data, seed=seed)
    options |= dict(device=device, dtype=dtype, save_dtype=save_dtype, store=store)
    options |= dict(statistics=None, memory=memory, name=name, measures=None)
    options |= dict(progress=progress, trust_remote_code=trust_remote_code)
    return _run(model, method, out, plan, **options)


def _run(
    model: str | Path,
    method: Method,
    out: str | Path,
    plan: Plan | None,
    *,
    calibration: Calibration | None,
    propagate: Propagate,
    data: str,
    seed: int,
    device: str,
    dtype: str,
    save_dtype: str,
    store: Store,
    statistics: str | Path | None,
    memory: MemoryChoices | None,
    measures: EvaluationRequest | None,
    trust_remote_code: bool,
    name: str | None,
    progress: bool,
    listener: CompressionListener | None = None,
) -> CompressionResult:
    from camera.calibration.settings import Calibration, check_calibration
    from camera.calibration.tokens import calibration_tokens
    from camera.checkpoint.loading import load_tokenizer
    from camera.checkpoint.source import resolve_model
    from camera.pipeline.compression import declared_passes, foresee, run
    from camera.pipeline.context import CompressionRequest, LayerListener
    from camera.pipeline.model_card import base_name
    from camera.runtime import distributed
    from camera.runtime.device.accelerator import make_current, resolve_device
    from camera.streaming.settings import MemoryChoices
    from camera.streaming.skeleton import MetaModel

    out, seed = Path(out).expanduser(), seed_of(seed)
    cache = Path(statistics).expanduser() if statistics else None
    if propagate not in get_args(Propagate):
        choices = ", ".join(get_args(Propagate))
        raise CameraError(f"propagate={propagate} is none of {choices}.")
    if store not in get_args(Store):
        raise CameraError(f"store={store} is none of {', '.join(get_args(Store))}.")
    if out.exists():
        raise CameraError(f"{out} exists already: delete it or choose another folder.")
    if not method.compresses:
        raise CameraError(f"method {method.name} leaves the model as it is: nothing to do.")
    folder = resolve_model(str(model))
    meta = MetaModel(folder, resolve_device(device), dtype, trust_remote_code, save_dtype)
    make_current(meta.device)
    method.check(meta.budget)
    if store == "source":
        meta.keep_as_stored(method.native)
    _check_plan(plan, method, meta)
    name = name or base_name(model)
    request = CompressionRequest(name, method, out, propagate, plan=plan)
    tokens, tokenizer = None, None
    memory = memory or MemoryChoices()
    if any(step.reads_text for step in declared_passes(request, meta.budget)):
        calibration = calibration or Calibration()
        context = getattr(meta.text_config, "max_position_embeddings", None)
        check_calibration(calibration, data=data)
        length = min(calibration.length, context or calibration.length)
        foresee(request, meta, memory, calibration.samples, length)
        tokenizer = load_tokenizer(folder, trust_remote_code)

        def write(samples: int, length: int) -> Any:
            from camera.pipeline.passes.self_sampling import self_sampled

            return self_sampled(meta, tokenizer, samples, length, seed, cache, trust_remote_code)

        tokens = calibration_tokens(
            tokenizer,
            calibration,
            data=data,
            seed=seed,
            max_length=context,
            vocabulary=meta.model.get_input_embeddings().num_embeddings,
            write=write,
        )
    listeners: Sequence[LayerListener] = ()
    if measures is not None and distributed.rank() == 0:
        from camera.evaluation.divergence.reference import DenseReference
        from camera.evaluation.suite import EvaluationDuringCompression

        if tokenizer is None:
            tokenizer = load_tokenizer(folder, trust_remote_code)
        kept = cache or request.private_statistics
        dense = DenseReference(folder, kept, device, dtype, trust_remote_code, progress=progress)
        listeners = (EvaluationDuringCompression(meta, tokenizer, measures, dense),)
    request = CompressionRequest(
        name,
        method,
        out,
        propagate,
        tokens,
        cache,
        plan,
        listeners,
        listener if distributed.rank() == 0 else None,
        progress,
    )
    return run(request, meta, memory)


def _check_plan(plan: Plan | None, method: Method, model: Any) -> None:
    """CameraError for a plan that was made for another model, or isn't one of its method."""
    if plan is None:
        return
    budget, ours = model.budget, f"the plan of method {plan.method}"
    here = {"model_type": budget.model_type, "hidden_size": budget.hidden}
    for key, value in here.items():
        if plan.model.get(key, value) != value:
            raise CameraError(
                f"{ours} was made for {key}={plan.model[key]}, and the model has {value}: apply it "
                "to the model that it was made for."
            )
    for index in sorted(set(budget.layers) ^ set(plan.layers)):
        told = "says nothing of" if index in budget.layers else "speaks of"
        raise CameraError(f"{ours} {told} layer {index}: it was made for another model.")
    for index, layer in sorted(plan.layers.items()):
        wrong = layer.misfit(budget.layers[index], budget.hidden)
        if method.plan_kind is not None and layer.kind != method.plan_kind:
            wrong = f"is of the kind {layer.kind}, where the method makes {method.plan_kind}"
        if wrong:
            raise CameraError(
                f"{ours}, layer {index}, {wrong}: apply it to the model that it was made for."
            )


def describe(model: str | Path, trust_remote_code: bool = False) -> CompressionResult:
    """The counts of a model, as `compress` reports them with nothing removed, and which engines
    serve it, as it is or after which export."""
    from camera.checkpoint.config import CameraConfig
    from camera.checkpoint.source import resolve_model, revision_of
    from camera.engines.fit import engines
    from camera.pipeline.result import CompressionResult, versions
    from camera.streaming.skeleton import MetaModel

    folder = resolve_model(str(model))
    meta = MetaModel(folder, trust_remote_code=trust_remote_code)
    dense, size = meta.budget.dense, meta.reader.bytes
    return CompressionResult(
        method="dense",
        model=str(model),
        settings={},
        sparsity={"asked": 0.0, "of": None, **dense.sparsity(dense)},
        bits=dict.fromkeys(("raw", "stored", "model"), 8 * dense.bytes / dense.model),
        bytes={"dense": size, "compressed": size},
        seconds={"calibrate": 0.0, "compress": 0.0},
        versions=versions(),
        revision=revision_of(folder),
        native=not isinstance(meta.compressed, CameraConfig),
        engines=engines(meta.config),
    )


def as_method(method: Method | str, settings: dict[str, Any]) -> Method:
    """A method from its name and settings; CameraError for an unknown name or setting."""
    if isinstance(method, Method):
        if settings:
            raise CameraError(
                f"settings {', '.join(settings)} can only be given with the name of a method: "
                "this one has its own."
            )
        return method
    cls = METHODS[method]
    known = inspect.signature(cls).parameters
    for key in settings:
        if key not in known:
            told = renaming("method", key, settings[key])
            raise CameraError(told or _no_setting(method, key, list(known)))
    try:
        return cls(**settings)
    except CameraError as error:
        told = [renaming("method", key, value) for key, value in settings.items()]
        raise CameraError(" ".join([str(error), *filter(None, told)])) from error
    except TypeError as error:
        raise CameraError(f"method {method}: {error}.") from error


def _no_setting(method: str, key: str, known: list[str]) -> str:
    others = [name for name in inspect.signature(compress).parameters if name != "settings"][3:]
    near = get_close_matches(key, [*known, *others], n=1)
    hint = f", did you mean {near[0]}" if near else ""
    return (
        f"method {method}: no setting is called {key}{hint}; "
        f"the settings of method {method} are {', '.join(known) or 'none'}; "
        f"compress takes {', '.join(others)}."
    )
