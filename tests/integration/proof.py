"""What every method makes of tiny models, byte by byte, before and after a change of the code.

    python tests/integration/proof.py BEFORE.json
    python tests/integration/proof.py AFTER.json --against BEFORE.json [--only SUBSTRING]

Weights and statistics are recorded as hashes, config.json and camera.json as they stand, without
what differs from run to run. `CASES` is all that knows how settings are named.
"""

import os

os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TRANSFORMERS_VERBOSITY="error",
    WANDB_MODE="offline",
)

import argparse
import csv
import hashlib
import importlib
import json
import logging
import pkgutil
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors import safe_open

import baselines
import camera
from camera.evaluation.suite import EvaluationRequest
from camera.runtime.distributed import process_group
from camera.streaming.settings import MemoryChoices
from tests.helpers.models import FAMILIES, build_model, build_tokenizer, write_layout

for module in pkgutil.walk_packages(baselines.__path__, "baselines."):
    importlib.import_module(module.name)  # its methods are known by name from here on

ROOT = Path(__file__).resolve().parents[2]
Case = tuple[str, dict[str, Any], dict[str, Any]]
Record = dict[str, Any]

# --- what is compressed, and how ---

PRUNE = dict(sparsity=0.4)
RENAMED = {"relative": "hidden_share"}  # cases keep the names they had
DROP = dict(sparsity=0.5, sparsity_of="routed")
PLUS = dict(**PRUNE, ridges=[3.0, 0.3], sweeps=3)
FIT = dict(**PLUS, compensate="layer")
Q = dict(bits=2.9, group_size=16)
DAGGER = dict(bits=4.2, group_size=16)
SHARES = dict(**Q, low_share=0.4)
GPTQ = dict(bits=3.15)
RTN = dict(bits=3.15)
MC = dict(bits=3.2, group_size=32)

# name -> (method, its settings, options). An option is an argument of camera.compress, or
#   after: the case whose checkpoint is compressed, instead of the original model;
#   export: the checkpoint is exported, and that is recorded;
#   killed: the run is killed at so many files, and started again;
#   keep: a folder of statistics is filled by the case of this name, then used;
#   processes: how many share the work.
CASES: dict[str, Case] = {
    # for all families
    "camera_p": ("camera_p", PRUNE, {}),
    "camera_plus": ("camera_plus", PLUS, {}),
    "heapr": ("heapr", PRUNE, {}),
    "camera_q": ("camera_q", Q, {}),
    "gptq": ("gptq", dict(bits=5.15), {}),
    "d2_moe": ("d2_moe", PRUNE, {}),
    "naee": ("naee", DROP, {}),
    "reap": ("reap", DROP, {}),
    # where budgets come from, what the next layer is fed, what is kept in memory
    "camera_p/alpha": ("camera_p", dict(**PRUNE, alpha=0.0), {}),
    "camera_p/global": ("camera_p", dict(**PRUNE, rank_scope="global"), {}),
    "camera_p/measured": ("camera_p", dict(**PRUNE, rank_scope="measured"), {}),
    "camera_p/dense": ("camera_p", PRUNE, dict(propagate="dense")),
    "camera_p/dense kept": (
        "camera_p",
        dict(sparsity=0.2, alpha=0.5),
        dict(propagate="dense", keep="camera_p/dense"),
    ),
    "camera_p/model": ("camera_p", dict(sparsity=0.3, sparsity_of="model"), {}),
    "camera_p/routed": ("camera_p", dict(sparsity=0.3, sparsity_of="routed"), {}),
    "camera_p/routed global": (
        "camera_p",
        dict(sparsity=0.3, sparsity_of="routed", rank_scope="global"),
        {},
    ),
    "camera_p/multiple": ("camera_p", dict(**PRUNE, width_multiple=8), {}),
    "camera_p/multiple global": (
        "camera_p",
        dict(**PRUNE, width_multiple=8, rank_scope="global"),
        {},
    ),
    "camera_p/multiple measured": (
        "camera_p",
        dict(**PRUNE, width_multiple=8, rank_scope="measured"),
        {},
    ),
    "camera_p/min width": ("camera_p", dict(**PRUNE, min_width=10), {}),
    "camera_p/min width global": ("camera_p", dict(**PRUNE, min_width=10, rank_scope="global"), {}),
    "camera_p/floor": ("camera_p", dict(**PRUNE, layer_floor=0.55, rank_scope="global"), {}),
    "camera_p/floor measured": (
        "camera_p",
        dict(**PRUNE, layer_floor=0.55, rank_scope="measured"),
        {},
    ),
    "camera_p/phi keep": ("camera_p", PRUNE, dict(memory=dict(phi="keep"))),
    "camera_p/phi recompute": ("camera_p", PRUNE, dict(memory=dict(phi="recompute"))),
    "camera_p/experts layer": ("camera_p", PRUNE, dict(memory=dict(experts="ram"))),
    "camera_p/experts visit": ("camera_p", PRUNE, dict(memory=dict(experts="disk"))),
    "camera_p/hidden disk": ("camera_p", PRUNE, dict(memory=dict(hidden="disk"))),
    "camera_p/c4": ("camera_p", PRUNE, dict(calibration=dict(source="c4"), seed=7)),
    "camera_p/few tokens": ("camera_p", PRUNE, dict(calibration=dict(samples=1, length=4))),
    "camera_p/bfloat16": ("camera_p", PRUNE, dict(dtype="bfloat16")),
    "camera_p/measures": ("camera_p", PRUNE, dict(measures=dict(corpora=["wikitext2"], blocks=2))),
    # output weights refitted
    "camera_p/fit layer": ("camera_p", dict(**FIT, target="layer"), {}),
    "camera_p/fit dense": ("camera_p", dict(**FIT, target="dense"), {}),
    "camera_p/fit expert": ("camera_p", dict(**PLUS, compensate="expert", target="layer"), {}),
    "camera_p/fit expert dense": (
        "camera_p",
        dict(**PLUS, compensate="expert", target="dense"),
        {},
    ),
    "camera_p/fit absolute": ("camera_p", dict(**FIT, target="layer", token_weights="uniform"), {}),
    "camera_p/fit dense absolute": (
        "camera_p",
        dict(**FIT, target="dense", token_weights="uniform"),
        {},
    ),
    "camera_p/fit held out": ("camera_p", dict(**FIT, held_out=0.5), {}),
    "camera_p/fit of dense energies": ("camera_p", FIT, dict(propagate="dense")),
    "camera_p/fit recompute": ("camera_p", FIT, dict(memory=dict(phi="recompute"))),
    # other scores
    **{
        f"camera_plus/{score} {scope}": (
            "camera_plus",
            dict(**PLUS, score=RENAMED.get(score, score), **more),
            {},
        )
        for score in ("fisher", "product", "energy", "relative", "residual")
        for scope, more in (
            ("layer", dict(rank_scope="layer")),
            ("global", dict(rank_scope="global")),
            ("measured", dict(rank_scope="measured")),
        )
    },
    "camera_plus/relative alpha": (
        "camera_plus",
        dict(**PLUS, score="hidden_share", alpha=0.5),
        {},
    ),
    "camera_plus/all": ("camera_plus", dict(**PLUS, normalize="all"), {}),
    "camera_plus/product all": ("camera_plus", dict(**PLUS, score="product", normalize="all"), {}),
    "camera_plus/none": ("camera_plus", dict(**PRUNE, compensate="none"), {}),
    "camera_plus/expert": ("camera_plus", dict(**PLUS, compensate="expert", target="layer"), {}),
    "camera_plus/layer": ("camera_plus", dict(**PLUS, target="layer"), {}),
    "camera_plus/absolute": ("camera_plus", dict(**PLUS, token_weights="uniform"), {}),
    "camera_plus/floor": ("camera_plus", dict(**PLUS, layer_floor=0.3, width_multiple=8), {}),
    "camera_plus/hidden disk": ("camera_plus", PLUS, dict(memory=dict(hidden="disk"))),
    "camera_plus/bfloat16": ("camera_plus", PLUS, dict(dtype="bfloat16")),
    "camera_plus/visit": (
        "camera_plus",
        dict(**PRUNE, compensate="none", rank_scope="global"),
        dict(memory=dict(experts="disk")),
    ),
    "heapr/layer": ("heapr", dict(**PRUNE, rank_scope="layer"), {}),
    "heapr/measured": ("heapr", dict(**PRUNE, rank_scope="measured"), {}),
    "heapr/joint": ("heapr", dict(**PRUNE, score="fisher"), {}),
    "heapr/all": ("heapr", dict(**PRUNE, normalize="all"), {}),
    "heapr/joint all": ("heapr", dict(**PRUNE, score="fisher", normalize="all"), {}),
    "heapr/routed": ("heapr", dict(**PRUNE, sparsity_of="routed"), {}),
    "heapr/multiple": ("heapr", dict(**PRUNE, width_multiple=8, min_width=8), {}),
    "heapr/fit": ("heapr", FIT, {}),
    "magnitude": ("magnitude", PRUNE, {}),
    "magnitude/sum": ("magnitude", dict(**PRUNE, score="weight_sum"), {}),
    "magnitude/global": ("magnitude", dict(**PRUNE, rank_scope="global"), {}),
    "magnitude/sum global": (
        "magnitude",
        dict(**PRUNE, score="weight_sum", rank_scope="global"),
        {},
    ),
    "magnitude/measured": ("magnitude", dict(**PRUNE, rank_scope="measured"), {}),
    "magnitude/fit": ("magnitude", FIT, {}),
    "magnitude/visit": ("magnitude", PRUNE, dict(memory=dict(experts="disk"))),
    "random": ("random", PRUNE, {}),
    "random/seed": ("random", dict(**PRUNE, seed=5), {}),
    "random/global": ("random", dict(**PRUNE, rank_scope="global"), {}),
    "random/multiple": ("random", dict(**PRUNE, width_multiple=8), {}),
    "random/fit": ("random", FIT, {}),
    # whole experts, and merged ones
    "reap/dense": ("reap", DROP, dict(propagate="dense")),
    "reap/softmax": ("reap", dict(**DROP, routing_weights="softmax"), {}),
    **{
        f"reap/{score}": ("reap", dict(**DROP, score=score), {})
        for score in ("weighted_ean_sum", "ean_sum", "ean_mean", "weighted_frequency")
    },
    "reap/model": ("reap", dict(sparsity=0.3, sparsity_of="model"), {}),
    "frequency": ("frequency", DROP, {}),
    "frequency/dense": ("frequency", DROP, dict(propagate="dense")),
    **{
        f"naee/{search}": ("naee", dict(**DROP, search=search, max_subsets=2000), {})
        for search in ("enumerate", "greedy", "random", "independent")
    },
    "naee/dense": ("naee", DROP, dict(propagate="dense")),
    "naee/sample": ("naee", dict(**DROP, sample_tokens=100, seed=5), {}),
    "naee/norms": ("naee", dict(**DROP, sample_tokens=0, norm_tokens=64), {}),
    **{
        f"d2_moe/{merge}": ("d2_moe", dict(**PRUNE, merge=merge), {})
        for merge in ("fisher", "freq", "mean")
    },
    "d2_moe/pruned base": ("d2_moe", dict(**PRUNE, pp_ratio=0.25), {}),
    "d2_moe/damping": ("d2_moe", dict(**PRUNE, damping=0.01), {}),
    "d2_moe/model": ("d2_moe", dict(sparsity=0.3, sparsity_of="model"), {}),
    # bits
    "gptq/three": ("gptq", GPTQ, {}),
    "gptq/group": ("gptq", dict(bits=4.25, group_size=16), {}),
    "gptq/whole row": ("gptq", dict(bits=3.12, group_size=-1), {}),
    "gptq/sym": ("gptq", dict(bits=3.0, sym=True), {}),
    "gptq/clip": ("gptq", dict(**GPTQ, clip="gptq"), {}),
    "gptq/clip mc": ("gptq", dict(**GPTQ, clip="mc"), {}),
    "gptq/act order": ("gptq", dict(bits=4.5, act_order=True), {}),
    "gptq/static groups": ("gptq", dict(bits=4.2, act_order=True, static_groups=True), {}),
    "gptq/percdamp": ("gptq", dict(**GPTQ, damping=0.1), {}),
    "gptq/mean hessian": (
        "gptq",
        dict(**GPTQ, fallback="mean_hessian", min_tokens=60),
        {},
    ),
    "gptq/min tokens": ("gptq", dict(**GPTQ, min_tokens=100), {}),
    "gptq/weighted": ("gptq", dict(**GPTQ, weighted_hessian=True), {}),
    "gptq/sequential": ("gptq", dict(**GPTQ, true_sequential=True), {}),
    "gptq/sequential few": (
        "gptq",
        dict(**GPTQ, true_sequential=True, sequential_tokens=40),
        {},
    ),
    "gptq/compensated": (
        "gptq",
        dict(**GPTQ, true_sequential=True, compensate="expert"),
        {},
    ),
    "gptq/attention": ("gptq", dict(**GPTQ, attn_bits=8), {}),
    "gptq/router": ("gptq", dict(**GPTQ, router_bits=4), {}),
    "gptq/dense": ("gptq", GPTQ, dict(propagate="dense")),
    "gptq/visit": ("gptq", GPTQ, dict(memory=dict(experts="disk"))),
    "gptq/bfloat16": ("gptq", GPTQ, dict(dtype="bfloat16")),
    "rtn": ("rtn", RTN, {}),
    "rtn/group": ("rtn", dict(bits=4.25, group_size=16), {}),
    "rtn/sym": ("rtn", dict(bits=3.0, sym=True), {}),
    "rtn/clip": ("rtn", dict(**RTN, clip="gptq"), {}),
    "rtn/attention": ("rtn", dict(**RTN, attn_bits=8, router_bits=4), {}),
    "mc": ("mc", MC, {}),
    "mc/batches": ("mc", dict(**MC, loss_norm="batches"), {}),
    "mc/paper": ("mc", dict(**MC, loss_exponent=2.0, expert_alpha=0.5, expert_beta=1.0), {}),
    "mc/shared bits": ("mc", dict(**MC, shared_bits=3), {}),
    "mc/at least one": ("mc", dict(**MC, at_least_one=[2]), {}),
    "mc/no feedback": ("mc", dict(**MC, inblock_feedback=False, clip="mc"), {}),
    "mc/dense": ("mc", MC, dict(propagate="dense")),
    "camera_q/alpha": ("camera_q", dict(**Q, alpha=0.0), {}),
    "camera_q/low share": ("camera_q", SHARES, {}),
    "camera_q/ratios": ("camera_q", dict(bits=3.75, ratios=[0.25, 0.5, 0.25]), {}),
    "camera_q/ratios only": (
        "camera_q",
        dict(bits=None, ratios=[0.3, 0.4, 0.3], group_bits=[3, 2, 0], group_size=16),
        {},
    ),
    "camera_q/five levels": ("camera_q", dict(**Q, group_bits=[4, 3, 2, 1, 0]), {}),
    "camera_q/two levels": ("camera_q", dict(**Q, group_bits=[3, 0]), {}),
    "camera_q/expert": ("camera_q", dict(**Q, rank_scope="expert"), {}),
    "camera_q/model": ("camera_q", dict(**SHARES, rank_scope="global"), {}),
    "camera_q/relative": ("camera_q", dict(**Q, score="hidden_share"), {}),
    "camera_q/fisher": ("camera_q", dict(**Q, score="fisher"), {}),
    "camera_q/fisher all": ("camera_q", dict(**Q, score="fisher", normalize="all"), {}),
    "camera_q/product": ("camera_q", dict(**Q, score="product"), {}),
    "camera_q/residual": ("camera_q", dict(**Q, score="residual"), {}),
    "camera_q/align": ("camera_q", dict(**Q, align=4), {}),
    "camera_q/static groups": ("camera_q", dict(**Q, act_order=True, static_groups=True), {}),
    "camera_q/clip": ("camera_q", dict(**Q, clip="gptq", sym=True), {}),
    "camera_q/compensated": (
        "camera_q",
        dict(**Q, true_sequential=True, compensate="expert"),
        {},
    ),
    "camera_q/mean hessian": ("camera_q", dict(**Q, fallback="mean_hessian", min_tokens=60), {}),
    "camera_q/attention": ("camera_q", dict(**Q, attn_bits=8, router_bits=8), {}),
    "camera_q/dense": ("camera_q", Q, dict(propagate="dense")),
    "camera_q/visit": ("camera_q", Q, dict(memory=dict(experts="disk"))),
    "camera_q/bfloat16": ("camera_q", Q, dict(dtype="bfloat16")),
    "camera_q_dagger": ("camera_q_dagger", DAGGER, {}),
    "camera_q_dagger/shuffle": ("camera_q_dagger", dict(**DAGGER, split="shuffle"), {}),
    "camera_q_dagger/seed": ("camera_q_dagger", dict(**DAGGER, split="shuffle", seed=5), {}),
    "camera_q_dagger/low share": ("camera_q_dagger", dict(**DAGGER, low_share=0.3), {}),
    "camera_q_dagger/expert": ("camera_q_dagger", dict(**DAGGER, rank_scope="expert"), {}),
    # from checkpoint to checkpoint
    "killed/camera_p": ("camera_p", PRUNE, dict(killed=5)),
    "killed/dense": ("camera_p", PRUNE, dict(killed=3, propagate="dense")),
    "killed/fit": ("camera_p", FIT, dict(killed=5)),
    "killed/camera_q": ("camera_q", Q, dict(killed=5)),
    "again/camera_p": ("camera_p", PRUNE, dict(after="camera_p")),
    "again/camera_plus": ("camera_plus", PLUS, dict(after="camera_p")),
    "again/camera_q": ("camera_q", dict(bits=3.4, group_size=16), dict(after="camera_p")),
    "again/gptq": ("gptq", dict(bits=4.5), dict(after="camera_p")),
    "again/packed": ("camera_p", PRUNE, dict(after="gptq")),
    "again/d2_moe": ("camera_p", PRUNE, dict(after="d2_moe")),
    "again/reap": ("camera_p", PRUNE, dict(after="reap")),
    "export/ragged": ("camera_p", PRUNE, dict(export=True)),
    "export/packed": ("camera_q", Q, dict(export=True)),
    "export/attention": ("gptq", dict(**GPTQ, attn_bits=8, router_bits=4), dict(export=True)),
    "export/delta": ("d2_moe", PRUNE, dict(export=True)),
    "two/layer": ("camera_p", PRUNE, dict(processes=2)),
    "two/global": ("camera_p", dict(**PRUNE, rank_scope="global"), dict(processes=2)),
    "two/measured": ("camera_p", dict(**PRUNE, rank_scope="measured"), dict(processes=2)),
    "two/fit": ("camera_p", dict(**FIT, target="dense"), dict(processes=2)),
    "two/fisher": ("camera_plus", dict(**PRUNE, compensate="none"), dict(processes=2)),
    "two/camera_q": ("camera_q", Q, dict(processes=2)),
    "two/naee": ("naee", DROP, dict(processes=2)),
}
EVERYWHERE = ("camera_p", "camera_plus", "heapr", "camera_q", "gptq", "d2_moe", "naee", "reap")
THOROUGH = ("qwen2_moe", "deepseek_v3")  # a shared expert; routers that choose groups first
OF_SEVERAL = ("qwen2_moe",)  # cases of several processes
# Of two experts a group none can be dropped.
OVERRIDES = {"deepseek_v3": dict(n_routed_experts=16)}
CALIBRATION = dict(source="wikitext2", samples=6, length=48)
SWEEP = (
    "-m method=dense,camera_p sparsity=0.2,0.4 evaluation.blocks=2 evaluation.limit=5 "
    "tracker=none calibration.samples=8 calibration.length=256"
)
# Of camera.json and of a table: what differs from run to run, or says how things are named.
NO_PART_OF_REPORT = {
    "seconds",
    "measured",
    "cached_statistics",
    "peak_memory_bytes",
    "expected_memory_bytes",
    "versions",
    "checkpoint",
    "settings",
    "native",
}
NO_PART_OF_TABLE = {"settings", "minutes", "evaluation_minutes", "peak_gb", "cached", "seconds"}
NO_PART_OF_TABLE |= {"folder", "studies", "data"}


def cases() -> list[tuple[str, str]]:
    """(family, case) of all that is compressed."""
    found = []
    for family in FAMILIES:
        for name, (_, _, options) in CASES.items():
            asked = family in (OF_SEVERAL if "processes" in options else THOROUGH)
            if name in EVERYWHERE or asked:
                found.append((family, name))
    return found


# --- compressing ---


class Killed(BaseException):
    """As good as kill -9: nothing of the library handles it."""


class Workshop:
    """A folder with the original models, in several shards, and a data folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "data"
        if not self.data.exists():
            write_layout(self.data)

    def source(self, family: str) -> Path:
        """The tiny model of a family."""
        folder = self.folder / family
        if not folder.exists():
            model = build_model(family, **OVERRIDES.get(family, {}))
            model.save_pretrained(folder, max_shard_size="60KB")
            build_tokenizer().save_pretrained(folder)
        return folder

    def compress(self, family: str, case: str, out: Path) -> Path:
        """The checkpoint of a case, in the folder `out`."""
        method, settings, options = CASES[case]
        options = dict(options)
        source = self.source(family)
        if "after" in options:
            source = self.compress(family, options.pop("after"), out.with_name("first"))
        if "keep" in options:
            options["statistics"] = out.with_name("statistics")
            method_before, settings_before, options_before = CASES[options.pop("keep")]
            shared = dict(options_before, statistics=options["statistics"])
            before = out.with_name("before")
            self._call(family, source, before, method_before, settings_before, shared)
        export, at = options.pop("export", False), options.pop("killed", None)
        options.pop("processes", None)
        if at is not None:
            try:
                with killed_at(at):
                    self._call(family, source, out, method, settings, options)
            except Killed:
                assert not out.exists() and list(out.parent.glob(f".{out.name}*"))
            else:
                raise AssertionError(f"{case} was through before it was killed")
        self._call(family, source, out, method, settings, options)
        return camera.export(out, out.with_name("export")) if export else out

    def _call(
        self,
        family: str,
        source: Path,
        out: Path,
        method: str,
        settings: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        options = dict(options)
        if "memory" in options:
            options["memory"] = MemoryChoices(**options["memory"])
        if "measures" in options:
            options["measures"] = EvaluationRequest(data=self.data, **options["measures"])
        camera.compress(
            source,
            method,
            out,
            calibration=camera.Calibration(**CALIBRATION | options.pop("calibration", {})),
            data=str(self.data),
            device="cpu",
            name=family,
            progress=False,
            **options,
            **settings,
        )


@contextmanager
def killed_at(number: int) -> Iterator[None]:
    """Kills at the file of this number, once it is written under another name but not in place."""
    original, count = os.replace, [0]

    def replace(*arguments: Any, **more: Any) -> None:
        count[0] += 1
        if count[0] == number:
            raise Killed
        original(*arguments, **more)

    with mock.patch("os.replace", replace):
        yield


def attempt(workshop: Workshop, family: str, case: str, out: Path) -> Record:
    """What a case gave: its record, or what it was refused with."""
    try:
        return record(workshop.compress(family, case, out))
    except Exception as error:
        return refusal(error, out.parent)


def refusal(error: Exception, folder: Path) -> Record:
    """What an error says, without the name of a folder that is another one each time."""
    return {"error": f"{type(error).__name__}: {error}".replace(str(folder), "WORK")}


def in_processes(workshop: Workshop, wanted: list[tuple[str, str]], number: int) -> list[Record]:
    """Records of cases that so many processes share, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["--standalone", f"--nproc-per-node={number}", str(Path(__file__).resolve())]
        what = [folder, "--worker", str(workshop.folder), json.dumps(wanted)]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *launch, *what],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr[-5000:])
        found = []
        for place in range(len(wanted)):
            said = Path(folder, f"{place}.error")
            out = Path(folder, str(place), "out")
            found.append(json.loads(said.read_text()) if said.exists() else record(out))
        return found


def work_in_a_process(folder: Path, workshop: Workshop, wanted: list[tuple[str, str]]) -> None:
    """What each of several processes does."""
    with process_group():
        for place, (family, case) in enumerate(wanted):
            try:
                workshop.compress(family, case, folder / str(place) / "out")
            except camera.CameraError as error:
                (folder / f"{place}.error").write_text(json.dumps(refusal(error, folder)))


# --- what is recorded ---


def record(folder: Path) -> Record:
    """All that a checkpoint has, for comparison: hashes and what its JSON files say."""
    shards = [p for p in sorted(folder.glob("*.safetensors")) if p.name != "plan.safetensors"]
    found: Record = {
        "weights": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in shards
            if not path.name.startswith("statistics")
        }
    }
    if not (folder / "camera.json").exists():  # exported
        hashes = [tensor_hashes(path) for path in shards]
        found["tensors"] = {name: value for part in hashes for name, value in part.items()}
    if (folder / "statistics.safetensors").exists():
        found["statistics"] = tensor_hashes(folder / "statistics.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.get("quantization_config", {}).pop("made_by", None)
    found["config"] = config
    if (folder / "camera.json").exists():
        report = json.loads((folder / "camera.json").read_text())
        found["report"] = {k: v for k, v in report.items() if k not in NO_PART_OF_REPORT}
    if (folder / "evaluation.json").exists():
        evaluation = json.loads((folder / "evaluation.json").read_text())
        found["perplexity"] = {
            corpus: {"perplexity": said["perplexity"], "data_hash": said["data_hash"]}
            for corpus, said in evaluation["perplexity"].items()
        }
    return found


def tensor_hashes(path: Path) -> dict[str, str]:
    """Hashes of a safetensors file's tensors, with their types and shapes."""
    found = {}
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).contiguous()
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            found[name] = digest.hexdigest()
    return found


def sweep() -> Record:
    """What a small sweep of main.py, from the embedded model to a table, gives."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "outputs")
        done = subprocess.run(
            [sys.executable, "main.py", *SWEEP.split(), f"output={output}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {"error": (done.stdout + done.stderr)[-3000:].replace(folder, "WORK")}
        with (output / "table.csv").open() as file:
            rows = list(csv.DictReader(file))
        found: Record = {}
        for row in rows:
            kept = {key: value for key, value in row.items() if key not in NO_PART_OF_TABLE}
            run = f"{row['method']} {row['sparsity']}".strip()
            found[run] = {"row": kept}
            energies = output / "runs" / row["folder"] / "energies.json"
            if energies.exists():
                found[run]["energies"] = json.loads(energies.read_text())
        return found


def about() -> Record:
    """What the bytes depend on besides the code."""
    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "lm-eval", "datasets")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    return {
        "commit": commit.strip(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# --- comparing ---


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Every place where two records differ, with what stands there."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            inside = f"{place}.{key}" if place else str(key)
            if key not in before:
                yield f"{inside}: only there now"
            elif key not in after:
                yield f"{inside}: gone"
            else:
                yield from differences(before[key], after[key], inside)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{place}[{number}]")
    elif before != after:
        yield f"{place}: {str(before)[:300]} -> {str(after)[:300]}"


def compare(before: Record, after: Record, only: str | None) -> int:
    """Print every difference; how many cases differ."""
    for line in differences(before["about"], after["about"]):
        print(f"note: about.{line}")
    wanted = [name for name in before if only is None or only in name]
    names = sorted({*wanted, *after} - {"about"})
    differing = 0
    for name in names:
        if name not in before or name not in after:
            lines = ["only there now" if name in after else "gone"]
        else:
            lines = list(differences(before[name], after[name]))
        differing += bool(lines)
        for line in lines:
            print(f"{name}: {line}")
    print(f"{len(names) - differing} of {len(names)} cases are equal")
    return differing


# --- the whole ---


def everything(only: str | None) -> Record:
    """The records of all cases whose key contains `only`."""

    def asked(key: str) -> bool:
        return only is None or only in key

    found: Record = {"about": about()}
    started = time.perf_counter()

    def keep(key: str, said: Record) -> None:
        found[key] = said
        told = said.get("error", "")[:150]
        print(f"{time.perf_counter() - started:6.1f} s  {key}  {told}", flush=True)

    with tempfile.TemporaryDirectory() as root:
        workshop = Workshop(Path(root))
        together: dict[int, list[tuple[str, str]]] = {}
        for family, case in cases():
            key = f"{family}/{case}"
            if f"{family}/source" not in found and asked(f"{family}/source"):
                keep(f"{family}/source", record_source(workshop.source(family)))
            if not asked(key):
                continue
            number = CASES[case][2].get("processes", 1)
            if number > 1:
                workshop.source(family)
                together.setdefault(number, []).append((family, case))
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "out")
                said = attempt(workshop, family, case, out)
            keep(key, said)
        for number, wanted in together.items():
            said = in_processes(workshop, wanted, number)
            for (family, case), one in zip(wanted, said, strict=True):
                keep(f"{family}/{case}", one)
    if asked("sweep"):
        keep("sweep", sweep())
    return found


def record_source(folder: Path) -> Record:
    """Hashes of an original model: where these differ, nothing else can be equal."""
    hashes = [tensor_hashes(path) for path in sorted(folder.glob("*.safetensors"))]
    return {"tensors": {name: value for part in hashes for name, value in part.items()}}


def main() -> int:
    """Parse the command line and do what it says; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--only", help="only cases whose FAMILY/NAME contains this")
    parser.add_argument("--against", type=Path, help="the JSON file of an earlier run")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("camera").setLevel(logging.ERROR)
    assert Path(camera.__file__).is_relative_to(ROOT), f"{camera.__file__} is not in {ROOT}"
    if arguments.worker:
        workshop, wanted = arguments.worker
        work_in_a_process(arguments.out, Workshop(Path(workshop)), json.loads(wanted))
        return 0
    before = json.loads(arguments.against.read_text()) if arguments.against else None
    found = everything(arguments.only)
    arguments.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    found = json.loads(arguments.out.read_text())
    refused = sum("error" in said for said in found.values())
    print(f"{len(found) - 1} cases, {refused} of them refused: {arguments.out}")
    return int(before is not None and compare(before, found, arguments.only) > 0)


if __name__ == "__main__":
    sys.exit(main())
