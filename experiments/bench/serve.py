"""What you serve: a model by several methods, its megabytes in each export, quality and speed."""

import argparse
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import camera
from camera.checkpoint.loading import load_model
from camera.checkpoint.source import resolve_model
from camera.evaluation.speed import measure_speed
from camera.evaluation.tasks.names import NINE_TASKS
from camera.runtime.errors import CameraError
from camera.runtime.files import write_json
from camera.streaming.skeleton import MetaModel
from experiments.bench.support import llama
from experiments.bench.support.synthetic import write_model
from experiments.bench.support.timing import clock
from experiments.config.location import EMBEDDED, EMBEDDED_MODEL
from experiments.tables.names.methods import display_name
from experiments.tiny_moe.layout import ensure_world

TEXTS = ("wikitext2", "c4")
UNIFORM = {"expert_widths": "uniform"}
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense": ("dense", "as it is", {}),
    "ragged": ("camera_p", "ragged", {}),
    "uniform": ("camera_p", "uniform", UNIFORM),
    "plus": ("camera_plus", "uniform", UNIFORM),
    "plus_routed": ("camera_plus", "uniform, shared whole", UNIFORM | {"sparsity_of": "routed"}),
    "magnitude": ("magnitude", "uniform", UNIFORM),
    "packed": ("layerwise_bits", "packed", {"sym": True}),
    "camera_q": ("camera_q", "packed", {"bits": 2.25}),
}
ASKED_FOR = "plus_routed"  # a row of models with routed and shared experts alone
RANDOM = "random"  # a model with Qwen3-30B-A3B's shapes divided by 4, and 4 layers


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench serve`."""
    parser.add_argument("models", nargs="+", help=f"folder, hub id, {EMBEDDED} or {RANDOM}")
    rows = [row for row in ROWS if row != ASKED_FOR]
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=rows)
    parser.add_argument("--data", default="hub", help="texts: hub, or a folder in that layout")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--width-multiple", type=int, default=1)
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--samples", type=int, default=48, help="of calibration")
    parser.add_argument("--length", type=int, default=512, help="of a sample")
    parser.add_argument("--blocks", type=int, default=12, help="of each text (0: no perplexity)")
    parser.add_argument("--block-length", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=0, help="questions of each task (0: no tasks)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, help="keeps checkpoints and rows: a stopped one goes on"
    )
    parser.add_argument("--table", type=Path, help="writes the rows there, in Markdown")


def run(args: argparse.Namespace) -> dict:
    """Every row's megabytes, perplexities, tasks and decoding speed in transformers and llama.cpp.

    Exports that are refused say why. Decoding is of one prompt on --threads CPU threads, the
    original and the compressed model in turns: in transformers fp32, in llama.cpp F16, where the
    best turn counts. The original is divided by: `ratio` 1.3 decodes 1.3 times as fast.
    """
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with _folder(args.out) as out:
        for model in args.models:
            served = _Served(model, out, args)
            for name in args.rows:
                rows.append(served.row(name))
                if args.table:
                    args.table.write_text(table(rows))
    return {"rows": rows, "settings": {k: v for k, v in vars(args).items() if _is_plain(v)}}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    tasks = any(row.get("average") is not None for row in rows)
    head = ["Model", "Method", "Shape", "Routed", "Shared", "MoE", "Checkpoint MB", "Native MB"]
    head += ["GGUF MB", "Packed MB", "Wiki2", "C4", *(["Avg"] if tasks else [])]
    head += ["transformers", "llama.cpp"]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for row in rows:
        size, speed = row["megabytes"], row["decode"]
        cells = [row["model"], display_name(row["method"]), row["shape"]]
        cells += [_range((row["widths"] or {}).get(kind)) for kind in ("routed", "shared")]
        cells.append(f"{100 * row['sparsity']:.1f}%" if row["sparsity"] else "–")
        names = ("checkpoint", "native", "gguf", "compressed-tensors")
        cells += [_cell(size.get(name), ".1f") for name in names]
        cells += [_cell(row["perplexity"].get(text), ".2f") for text in TEXTS]
        cells += [_cell(row.get("average"), ".1f")] if tasks else []
        for engine in ("transformers", "llama.cpp"):
            found = speed.get(engine) or {}
            ratio = found.get("ratio")
            told = _cell(found.get("tokens_per_second"), ".0f")
            cells.append(told if ratio is None else f"{told} ({ratio:.2f} ×)")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def settings_of(name: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Settings of a row's method; with sparsity_of=routed as much of all experts goes."""
    _, shape, settings = ROWS[name]
    if shape == "packed":
        return {"bits": args.bits} | settings
    asked = {"sparsity": args.sparsity, "width_multiple": args.width_multiple} | settings
    if asked.get("sparsity_of") == "routed":
        dense = MetaModel(resolve_model(model)).budget.dense
        if not 0 < dense.routed < dense.moe:
            raise CameraError(f"{model} hasn't both kinds of experts: leave out {name}.")
        asked["sparsity"] *= dense.moe / dense.routed
    return asked


class _Served:
    """One model: its rows are made one after the other, each kept in a file of its own."""

    def __init__(self, model: str, out: Path, args: argparse.Namespace):
        self.args, self.data, self.source = args, args.data, model
        self.name = Path(model).name.replace("@", "-")
        self.folder = out / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        if model in (EMBEDDED, RANDOM):
            self.source, self.data = str(EMBEDDED_MODEL), str(ensure_world(out / "data"))
        if model == RANDOM:
            made = self.folder / "source"
            if not made.exists():
                write_model(made, "qwen3_30b_a3b", layers=4, scale=4, length=512)
            self.source = str(made)

    def row(self, name: str) -> dict[str, Any]:
        """A row, as it was measured in an earlier run if `--out` has it."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, self._measured(name))
        return json.loads(path.read_text())

    def _measured(self, name: str) -> dict[str, Any]:
        method, shape, _ = ROWS[name]
        done = None
        checkpoint = self.source
        if name != "dense":
            checkpoint, done = self._compressed(name)
        found = {
            "model": self.name,
            "method": method,
            "shape": shape,
            "sparsity": done and done["sparsity"]["moe"],
            "widths": done and _widths(done),
            "megabytes": {"checkpoint": _megabytes(camera.describe(checkpoint).bytes["dense"])},
            "refused": {},
            **self._quality(checkpoint),
            "decode": {"transformers": self._in_transformers(checkpoint, name == "dense")},
        }
        formats = {"gguf": ".gguf"}
        if done and not done["native"]:
            formats |= {"native": ""}
        elif done:
            found["megabytes"]["native"] = found["megabytes"]["checkpoint"]
        if shape == "packed":
            formats |= {"compressed-tensors": ""}
        for form, suffix in formats.items():
            out = self.folder / f"{name}-{form}{suffix}"
            try:
                self._export(checkpoint, out, form)
            except CameraError as error:
                found["refused"][form] = str(error)
                continue
            found["megabytes"][form] = _megabytes(_bytes(out))
            if form == "gguf":
                found["decode"]["llama.cpp"] = self._in_llama(out)
            if name != "dense":
                shutil.rmtree(out) if out.is_dir() else out.unlink()
        return found

    def _compressed(self, name: str) -> tuple[str, dict]:
        """A checkpoint, made unless an earlier run left it, and its report."""
        out, args = self.folder / name, self.args
        method, _, _ = ROWS[name]
        asked = settings_of(name, self.source, args)
        if not out.exists():
            camera.compress(
                self.source,
                method,
                out,
                calibration=camera.Calibration("wikitext2", args.samples, args.length),
                data=self.data,
                statistics=self.folder / "statistics",
                device="cpu",
                dtype="float32",
                **asked,
            )
        return str(out), json.loads((out / "camera.json").read_text())

    def _export(self, checkpoint: str, out: Path, form: str) -> None:
        if out.exists():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        camera.export(checkpoint, out, format=form, type="F16" if form == "gguf" else None)

    def _quality(self, checkpoint: str) -> dict[str, Any]:
        args = self.args
        if not args.blocks:
            return {"perplexity": {}, "average": None}
        found = camera.evaluate(
            checkpoint,
            perplexity=TEXTS,
            tasks=NINE_TASKS if args.limit else (),
            data=self.data,
            length=args.block_length,
            blocks=args.blocks,
            limit=args.limit or None,
            device="cpu",
            dtype="float32",
        )
        told = {text: round(found["perplexity"][text]["perplexity"], 3) for text in TEXTS}
        return {"perplexity": told, "average": found["average"]}

    def _in_transformers(self, checkpoint: str, dense: bool) -> dict[str, Any] | None:
        if dense:
            return None
        args = self.args
        original, smaller = (load_model(m, "cpu", "float32") for m in (self.source, checkpoint))
        vocabulary = original.config.get_text_config().vocab_size
        sizes = dict(batch_sizes=(1,), prompt_length=16, new_tokens=args.tokens)
        sizes |= dict(repeats=args.repeats, clock=clock("cpu"))
        found = measure_speed(original, smaller, vocabulary, **sizes)["batches"]["1"]["decode"]
        return {"tokens_per_second": found["compressed"], "ratio": found["ratio"]}

    def _in_llama(self, path: Path) -> dict[str, Any]:
        dense = self.folder / "dense-gguf.gguf"
        if path != dense and not dense.exists():
            self._export(self.source, dense, "gguf")
        servers = {side: llama.server(file, self.args.threads) for side, file in _pair(path, dense)}
        best = dict.fromkeys(servers, 0.0)
        for _ in range(self.args.repeats):
            for side, server in servers.items():
                best[side] = max(best[side], llama.tokens_per_second(server, self.args.tokens))
        told = {"tokens_per_second": round(best["this"], 2)}
        return told | ({"ratio": round(best["this"] / best["dense"], 3)} if path != dense else {})


def _pair(path: Path, dense: Path) -> list[tuple[str, Path]]:
    return [("this", path)] if path == dense else [("dense", dense), ("this", path)]


@contextmanager
def _folder(out: Path | None):
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="camera-serve-") as made:
        yield Path(made)


def _widths(report: dict[str, Any]) -> dict[str, list[int]]:
    """The narrowest and the widest expert that is left, routed and others apart."""
    found: dict[str, list[int]] = {}
    for path, widths in report["widths"].items():
        kind = "routed" if path.endswith("experts") and "shared" not in path else "shared"
        both = [*found.get(kind, []), *widths]
        found[kind] = [min(both), max(both)]
    return found


def _range(ends: list[int] | None) -> str:
    return "–" if ends is None else "–".join(map(str, sorted(set(ends))))


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _megabytes(size: int) -> float:
    return round(size / 1e6, 1)


def _cell(number: float | None, form: str) -> str:
    return "–" if number is None else format(number, form)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | list)
