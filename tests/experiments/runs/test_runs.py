"""One run: its folder's name, its parts, what is skipped, redone, recorded when it fails."""

import hashlib
import json
import re
import time
from dataclasses import replace

import pytest

import camera
from camera.evaluation.tasks.names import NINE_TASKS
from camera.pruning import slicing
from camera.runtime.errors import CameraError
from experiments.records.folders import Folders
from experiments.records.identity import compression_identity
from experiments.runs import measurements
from experiments.runs.run import run
from experiments.tables.rows import read_runs
from experiments.tiny_moe import layout
from tests.helpers.runs.composing import choices, settings_of, tiny

KEYS = {
    "method",
    "model",
    "settings",
    "sparsity",
    "bits",
    "perplexity",
    "tasks",
    "average",
    "bytes",
    "seconds",
    "peak_memory_bytes",
    "coverage",
    "versions",
    "data_hash",
    "seed",
    "environment",
}
SCORE = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": None, "acc_norm_stderr": None}


@pytest.fixture
def make(checkpoints, data_folder, tmp_path):
    """make(*overrides): settings of a run that takes a second."""
    return lambda *more: settings_of(*tiny(checkpoints("qwen2_moe"), data_folder, tmp_path), *more)


@pytest.fixture
def tasks(monkeypatch):
    """Tasks answered without lm-eval; the list of what was asked."""
    asked = []

    def evaluate(model, tokenizer, names, **options):
        asked.extend(names)
        return {name: {**SCORE, "data_hash": "0", "seconds": 0.0} for name in names}

    def write(model, tokenizer, names, **options):
        found = {"metric": "exact_match", "score": 0.5, "stderr": 0.1, "metrics": {}, "n": 4}
        return {name: {**found, "seconds": 0.0} for name in names}

    monkeypatch.setattr(measurements, "evaluate_tasks", evaluate)
    monkeypatch.setattr("camera.evaluation.tasks.evaluate.check_tasks", lambda *_, **__: None)
    monkeypatch.setattr(measurements, "evaluate_generative", write)
    monkeypatch.setattr(
        "camera.evaluation.tasks.generative.check_generative", lambda *_, **__: None
    )
    return asked


def names(settings):
    folders = Folders.of(settings)
    return folders.run.name, folders.checkpoint.name


def test_what_changes_the_result_names_the_folders(make):
    run_name, checkpoint = names(make())
    batches = ("evaluation.batch_size=3", "evaluation.perplexity_batch_size=3")
    for same in ("force=true", "retry=failed", "tracker=wandb", *batches):
        assert names(make(same)) == (run_name, checkpoint)
    for other in ("evaluation.blocks=3", "evaluation=none"):
        assert names(make(other))[0] != run_name
        assert names(make(other))[1] == checkpoint
    arithmetic = ("dtype=bfloat16", "device=cuda", "memory.experts=disk", "memory.phi=recompute")
    settings = ("alpha=0.5", "sparsity=0.3", "seed=1", "propagate=dense", "trust_remote_code=true")
    for other in (*settings, *arithmetic):
        assert names(make(other))[0] != run_name
        assert names(make(other))[1] != checkpoint


def test_only_what_a_method_uses_names_its_folders(make):
    dense = names(make("method=dense"))
    for unused in ("alpha=0.5", "sparsity=0.3", "propagate=dense", "calibration=c4"):
        assert names(make("method=dense", unused)) == dense
    drawn = names(make("method=random"))
    assert names(make("method=random", "calibration=c4", "alpha=0")) == drawn
    assert names(make("method=random", "seed=1")) != drawn


def test_a_folder_is_named_by_content_not_by_place(make, checkpoints, tmp_path):
    folder = checkpoints("qwen2_moe")
    copy = tmp_path / "copy"
    copy.symlink_to(folder)
    name = "model.name=m"
    assert names(make(name)) == names(make(name, f"model.path={copy}"))
    assert names(make(name)) != names(make(name, f"model.path={checkpoints('olmoe')}"))


def test_a_run_writes_its_parts_and_the_documented_report(make, tasks, drawn):
    folder = run(make("evaluation.tasks=[boolq,piqa]"))
    files = {file.name for file in folder.iterdir()}
    assert files >= {
        "compress.json",
        "perplexity-wikitext2.json",
        "perplexity-c4.json",
        "task-boolq.json",
        "task-piqa.json",
        "energies.png",
        "widths.png",
        "metrics.json",
        "settings.json",
        "DONE",
    }
    assert all(file.stat().st_size > 5000 for file in folder.glob("*.png"))  # drawn for real
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() >= KEYS
    assert metrics["sparsity"].keys() == {"asked", "of", "moe", "model", "routed"}
    assert abs(metrics["sparsity"]["moe"] - 0.2) < 0.01
    assert metrics["perplexity"].keys() == {"wikitext2", "c4"}
    assert metrics["tasks"] == {"boolq": SCORE, "piqa": SCORE}
    assert metrics["average"] == 50
    assert metrics["bytes"]["compressed"] < metrics["bytes"]["dense"]
    assert metrics["seconds"].keys() >= {"calibrate", "compress", "evaluate"}
    assert not [name for name in files if name.startswith(".")]


def test_a_finished_run_is_skipped_and_force_redoes_it(make, monkeypatch):
    settings = make()
    folder = run(settings)
    compressed = []
    compress = camera.compress

    def counted(*arguments, **options):
        compressed.append(options)
        return compress(*arguments, **options)

    monkeypatch.setattr(camera, "compress", counted)
    run(settings)
    assert not compressed
    run(replace(settings, force=True))
    assert len(compressed) == 1
    since = (folder / "DONE").stat().st_mtime
    run(replace(settings, force=True), since=since)
    assert len(compressed) == 1, "jobs of one sweep don't redo each other's run"


def test_done_parts_are_kept_and_another_evaluation_reuses_the_checkpoint(make, tasks, monkeypatch):
    settings = make("evaluation.tasks=[boolq,piqa]")
    folder = run(settings)
    monkeypatch.setattr(camera, "compress", None)
    monkeypatch.setattr(measurements, "perplexity", lambda *_, **__: pytest.fail("done already"))
    for gone in ("DONE", "metrics.json", "task-piqa.json"):
        (folder / gone).unlink()
    run(settings)
    assert tasks == ["boolq", "piqa", "piqa"]
    run(make("evaluation.tasks=[rte]", "evaluation.perplexity=[]"))
    assert tasks[3:] == ["rte"]


def test_a_failure_is_in_the_folder_and_the_next_try_goes_on(make, tasks, monkeypatch):
    settings = make("evaluation.tasks=[boolq]")

    def fail(*_, **__):
        raise CameraError("boolq is\n nowhere.")

    with monkeypatch.context() as patch:
        patch.setattr(measurements, "evaluate_tasks", fail)
        with pytest.raises(CameraError):
            run(settings)
    folder = Folders.of(settings).run
    lines = (folder / "error.txt").read_text().splitlines()
    assert lines[0] == "boolq is nowhere."
    assert "Traceback" in lines[2]
    assert not (folder / "DONE").exists() and not (folder / "metrics.json").exists()
    run(settings)
    assert (folder / "DONE").exists() and not (folder / "error.txt").exists()


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (["sparsity=1.5"], r"sparsity=1\.5"),
        (["sparsity=0.999", "method.min_width=8"], "the largest possible"),  # for this model
        (["method=gptq", "bits=2.25"], "set bits="),
    ],
)
def test_what_is_refused_before_any_weight_is_read_leaves_nothing(refused, told, make):
    settings = make(*refused)
    with pytest.raises(CameraError, match=told):
        run(settings)
    assert not Folders.of(settings).output.folder.joinpath("runs").exists()


def test_names_tell_method_and_ratio_and_a_run_begins_with_its_checkpoints(make):
    for overrides, expected in (
        (["sparsity=0.4"], r".+-camera_p-40-[0-9a-f]{6}"),
        (["sparsity=0.375"], r".+-camera_p-37\.5-[0-9a-f]{6}"),
        (["method=camera_q", "bits=2.25"], r".+-camera_q-2\.25bit-[0-9a-f]{6}"),
        (["method=dense"], r".+-dense-[0-9a-f]{6}"),
    ):
        of_run, of_checkpoint = names(make(*overrides))
        assert re.fullmatch(expected, of_checkpoint)
        assert re.fullmatch(re.escape(of_checkpoint) + "-[0-9a-f]{4}", of_run)


def test_folders_that_are_named_in_the_old_way_are_found(make):
    settings = make("evaluation=none", "method=random")
    new = Folders.of(settings)
    old = f"{settings.model['name']}-random-"
    compression = compression_identity(settings)
    for folder, identity in ((new.run, new.identity), (new.checkpoint, compression)):
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
        (folder.parent / f"{old}{digest}").mkdir(parents=True)
    found = Folders.of(settings)
    assert found.run.parent == new.run.parent and found.run.name.startswith(old)
    assert {len(f.name) for f in (found.run, found.checkpoint)} == {len(old) + 10}


def test_two_compressions_with_one_short_name_are_told_apart(make, monkeypatch):
    monkeypatch.setattr("experiments.records.folders._hash", lambda *_: "aaaaaa")
    run(make("method=random", "evaluation=none"))
    run(make("method=random", "evaluation=none", "retry=failed"))  # the same one
    with pytest.raises(CameraError, match="happens to have the same name"):
        run(make("method=random", "evaluation=none", "seed=5"))


def test_one_dense_pass_serves_every_alpha_and_sparsity(make):
    shared = ("propagate=dense", "evaluation=none")
    folder = Folders.of(make(*shared)).output.statistics
    run(make(*shared))
    (measured,) = folder.glob("*.safetensors")
    written = measured.stat().st_mtime_ns
    run(make(*shared, "alpha=0", "sparsity=0.4"))
    assert list(folder.glob("*.safetensors")) == [measured]
    assert measured.stat().st_mtime_ns == written


def test_methods_that_see_the_same_share_what_was_seen(make):
    folder = Folders.of(make()).output.statistics
    run(make("method=camera_plus", "method.rank_scope=global", "evaluation=none"))
    (measured,) = folder.glob("*.safetensors")
    written = measured.stat().st_mtime_ns
    run(make("method=heapr", "evaluation=none"))
    assert list(folder.glob("*.safetensors")) == [measured]
    assert measured.stat().st_mtime_ns == written


def test_a_checkpoint_can_be_given_up_once_it_is_measured(make):
    settings = make("keep_checkpoint=false", "evaluation.perplexity=[wikitext2]")
    folder = run(settings)
    assert (folder / "DONE").exists()
    assert not Folders.of(settings).checkpoint.exists()


@pytest.mark.parametrize("method", choices("method"))
def test_every_method_runs(method, make):
    # tiny layers: what two bits and their scales come to is far from 2.25
    bits = {"gptq": 3.2, "rtn": 3.2, "mc": 3.2, "layerwise_bits": 4.5}.get(method)
    asked = ("evaluation.perplexity=[wikitext2]", *([f"bits={bits}"] if bits else []))
    folder = run(make(f"method={method}", *asked))
    assert (folder / "DONE").exists()


@pytest.mark.parametrize("calibration", choices("calibration"))
def test_every_calibration_runs(calibration, make):
    source = (f"calibration={calibration}", "calibration.samples=4", "calibration.length=48")
    folder = run(make(*source, "evaluation=none"))
    described = json.loads((folder / "compress.json").read_text())["calibration"]
    shares = {"mix": "wikitext2 50% + c4 50%"}
    assert described["source"] == shares.get(calibration, calibration)


@pytest.mark.parametrize("evaluation", choices("evaluation"))
def test_every_evaluation_runs(evaluation, make, tasks):
    folder = run(make("method=dense", f"evaluation={evaluation}", "evaluation.blocks=1"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(tasks) == set(metrics["tasks"])
    assert set(tasks) in (set(), set(NINE_TASKS))
    assert list(metrics["generative"]) == metrics["settings"]["evaluation"]["generative"]["tasks"]


def test_a_run_killed_while_it_measures_does_not_look_finished(make, monkeypatch):
    def killed(*arguments, corpus, **options):
        if corpus == "c4":
            raise RuntimeError("killed")
        return perplexity(*arguments, corpus=corpus, **options)

    settings, perplexity = make("method=dense"), measurements.perplexity
    monkeypatch.setattr(measurements, "perplexity", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(settings)
    folders = Folders.of(settings)
    files = {file.name for file in folders.run.iterdir()}
    assert files == {
        "compress.json",
        "perplexity-wikitext2.json",
        "settings.json",
        "error.txt",
        "log.txt",
    }
    assert not folders.files.is_done
    assert list(read_runs([folders.run])["status"]) == ["failed: RuntimeError: killed"]


def test_a_run_killed_while_it_compresses_leaves_no_checkpoint_and_force_starts_anew(
    make, monkeypatch
):
    sliced, slice_layer = [], slicing.slice_layer

    def killed(*arguments):
        sliced.append(arguments)
        if len(sliced) == 2:
            raise RuntimeError("killed")
        return slice_layer(*arguments)

    settings = make("evaluation=none")
    folders = Folders.of(settings)
    with monkeypatch.context() as patch:
        patch.setattr(slicing, "slice_layer", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(settings)
    assert folders.partial.exists() and not folders.checkpoint.exists()
    assert not (folders.files.is_done or folders.is_compressed)
    assert not (folders.run / "metrics.json").exists()
    folders.remove_outputs(before=time.time())
    assert not folders.partial.exists() and not folders.run.exists()
    run(replace(settings, force=True))
    assert folders.files.is_done and folders.is_compressed and not folders.partial.exists()


def test_a_changed_embedded_world_is_another_run(make, monkeypatch):
    before = names(make("data=embedded"))
    assert Folders.of(make("data=embedded")).identity["data"] == f"embedded-{layout.fingerprint()}"
    monkeypatch.setattr(layout, "fingerprint", lambda: "other")
    assert all(old != new for old, new in zip(before, names(make("data=embedded")), strict=True))


def test_cards_and_reports_name_the_model_not_this_machines_folder(make, checkpoints):
    settings = make("model.name=mine", "evaluation=none")
    run(settings)
    checkpoint = Folders.of(settings).checkpoint
    assert json.loads((checkpoint / "camera.json").read_text())["model"] == "mine"
    assert str(checkpoints("qwen2_moe")) not in (checkpoint / "README.md").read_text()
    dense = run(make("model.name=mine", "evaluation=none", "method=dense"))
    assert json.loads((dense / "compress.json").read_text())["model"] == "mine"


def test_a_folder_is_named_by_no_import_path(make):
    identity = Folders.of(make("method=heapr")).identity
    assert identity["method"]["name"] == "heapr"
    assert "_target_" not in json.dumps(identity)
