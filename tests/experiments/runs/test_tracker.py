"""The offline W&B runs of a tiny sweep, read back from their files: keys, steps, tables, types."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camera.calibration.statistics import Statistics
from camera.method import Plan
from experiments.config.settings import Settings
from experiments.records.files import OutputFolder
from experiments.runs import measurements
from experiments.runs.summary import CARRIED_OUT, numbers_of
from tests.helpers.runs.composing import command, tiny
from tests.helpers.runs.offline_wandb import Kept, read_back

TASKS = ("boolq", "piqa")
POOL = 8 * 24 + 40  # eight routed experts and the shared one
COSTS = {"sparsity/moe", "sparsity/model", "size/gb", "size/share"}
COSTS |= {f"seconds/{part}" for part in ("calibrate", "compress", "evaluate")}
SCORES = {"perplexity/wikitext2", "perplexity/c4", "acc/boolq", "acc/piqa", "average"}
BITS = {"bits/stored", "bits/model"}


@pytest.fixture(scope="module")
def output(checkpoints, data_folder, tmp_path_factory) -> OutputFolder:
    """A sweep of four runs, tracked offline."""
    output = tmp_path_factory.mktemp("tracked")
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, output)
    grids = "[{method:dense},{method:camera_p,sparsity:[0.2,0.4]},{method:rtn,bits:4.2}]"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_DATA_DIR", raising=False)
        patch.setattr(measurements, "evaluate_tasks", answers)
        patch.setattr("camera.evaluation.tasks.evaluate.check_tasks", lambda *_, **__: None)
        tracked = ("tracker=wandb", "tracker.tags=[study]", "tracker.artifacts=[plan,statistics]")
        tasks = f"evaluation.tasks=[{','.join(TASKS)}]"
        sweep = ("experiment=main", f"hydra.sweeper.grids.main={grids}", "alpha=0.7")
        assert command(*overrides, *tracked, tasks, *sweep) == 0
    return OutputFolder(output)


@pytest.fixture(scope="module")
def sweep(output) -> Kept:
    """The run of type sweep."""
    (files,) = output.sweeps()
    (kept,) = read_back(files.folder)
    return kept


@pytest.fixture(scope="module")
def runs(output) -> dict[str, tuple[Path, Kept]]:
    """Each run by its name in W&B: its folder, and what W&B kept of it."""
    found = {}
    for folder in output.runs():
        (kept,) = read_back(folder)
        found[kept.run.display_name] = (folder, kept)
    return found


def test_names_say_method_and_ratio(runs, sweep, data_folder):
    assert set(runs) == {"dense", "camera_p-20", "camera_p-40", "rtn-4.2bits"}
    group = sweep.run.run_group
    assert sweep.run.display_name == group and sweep.run.job_type == "sweep"
    name = Path(sweep.config["sweep"]).name
    assert group == f"main-{name[:13]}" and " " not in group
    for shown, (_, kept) in runs.items():
        assert kept.exit == 0 and kept.run.run_group == group
        assert kept.run.job_type == shown.split("-")[0]
    shared = tags(runs["dense"]) - {"dense"}
    assert len(shared) == 4 and shared > {"main", "study", data_folder.name}
    assert tags(runs["camera_p-40"]) == {*shared, "camera_p", "40%"}
    assert tags(runs["rtn-4.2bits"]) == {*shared, "rtn", "4.2 bits"}


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("dense", {"sparsity", "sparsity_of", "bits", "alpha", "propagate", "calibration"}),
        ("camera_p-40", {"bits"}),
        ("rtn-4.2bits", {"sparsity", "sparsity_of", "alpha", "propagate", "calibration"}),
    ],
)
def test_settings_that_a_method_ignores_are_null(name, ignored, runs):
    folder, kept = runs[name]
    asked = json.loads((folder / "settings.json").read_text())["settings"]
    null = {key for key, value in kept.config.items() if value is None}
    assert null - {"memory", "save_dtype", "store"} == ignored
    for key in kept.config.keys() - null - {"_wandb", "method", "calibration"}:
        assert kept.config[key] == asked[key]
    told = {field.name for field in fields(Settings)}
    assert told == {*CARRIED_OUT, *kept.config} - {"_wandb"}
    own = {key: value for key, value in asked["method"].items() if key != "_target_"}
    assert kept.config["method"] == {"name": kept.run.job_type, **own}


def test_layers_are_curves_over_the_layer(runs):
    pruned, quantised = runs["camera_p-40"][1], runs["rtn-4.2bits"][1]
    assert pruned.steps == {"layer/*": "layer", "energy/*": "layer"}
    common = {"layer/seconds", "layer/memory_gb"}
    assert curves(pruned) == {*common, "layer/kept_share", "layer/energy_removed"}
    assert curves(quantised) == {*common, "layer/bits", "layer/output_error"}
    assert not curves(runs["dense"][1])
    for kept in (pruned, quantised):
        for key in curves(kept):
            curve = kept.curve(key)
            assert list(curve) in ([0, 1, 2], [1, 2])  # the first layer has no experts
            assert all(isinstance(value, float) and value >= 0 for value in curve.values())


def test_curves_are_what_the_checkpoint_says(runs):
    folder, kept = runs["camera_p-40"]
    report = json.loads((folder / "compress.json").read_text())
    checkpoint = Path(report["checkpoint"])
    plan = Plan.load(checkpoint)
    statistics = Statistics.load(checkpoint / "statistics.safetensors").layers
    for layer in range(3):
        energy_N = statistics[layer].energy(0.7).numpy()
        keep_N = plan.layers[layer].keep_N.numpy()
        removed = energy_N[~keep_N].sum() / energy_N.sum()
        assert kept.curve("layer/kept_share")[layer] == pytest.approx(keep_N.mean())
        assert kept.curve("layer/energy_removed")[layer] == pytest.approx(removed)
    quantised = json.loads((runs["rtn-4.2bits"][0] / "compress.json").read_text())
    stored = np.mean(list(runs["rtn-4.2bits"][1].curve("layer/bits").values()))
    assert stored == pytest.approx(quantised["bits"]["stored"])


def test_energies_are_one_histogram_over_the_layer(runs):
    _, kept = runs["camera_p-40"]
    rows = [row for row in kept.rows if "energy/histogram.values" in row]
    assert [row["layer"] for row in rows] == [0, 1, 2]
    edges = {tuple(row["energy/histogram.bins"]) for row in rows}
    assert len(edges) == 1
    for row in rows:
        assert row["energy/histogram._type"] == "histogram"
        assert len(*edges) == len(row["energy/histogram.values"]) + 1
        assert 0 < sum(row["energy/histogram.values"]) <= POOL


def test_results_are_the_summary_and_no_curve(runs):
    memory = {"memory/peak_gb"}
    for name, more in (("dense", set()), ("camera_p-40", memory), ("rtn-4.2bits", memory | BITS)):
        folder, kept = runs[name]
        metrics = json.loads((folder / "metrics.json").read_text())
        known = {*SCORES, *COSTS, *more}
        assert numbers(kept) == known and len(known) <= 22
        for text in ("wikitext2", "c4"):
            assert kept.summary[f"perplexity/{text}"] == metrics["perplexity"][text]
        assert kept.summary["acc/boolq"] == 40 and kept.summary["acc/piqa"] == 60
        assert kept.summary["average"] == pytest.approx(metrics["average"]) == pytest.approx(50)
        assert numbers_of(metrics).keys() == numbers(kept)
        logged = {key for row in kept.rows for key in row if not key.startswith("_")}
        assert not logged & known and not [key for key in logged if " " in key]


def test_scores_are_tables_too_by_the_names_of_their_data(runs, data_folder):
    folder, kept = runs["camera_p-20"]
    metrics = json.loads((folder / "metrics.json").read_text())
    own = data_folder.name
    perplexity = kept.table("tables/perplexity").set_index("text")["perplexity"]
    named = {f"{own}/{text}": value for text, value in metrics["perplexity"].items()}
    assert perplexity.to_dict() == pytest.approx(named)
    table = kept.table("tables/tasks").set_index("task")
    assert table.index.tolist() == [f"{own}/{task}" for task in TASKS]
    assert table["metric"].tolist() == ["acc", "acc_norm"]
    assert table["score"].tolist() == pytest.approx([40, 60])
    assert table["standard error"].tolist() == pytest.approx([1, 2])


def test_every_figure_of_the_folder_is_an_image(runs):
    for name, least in (("camera_p-40", {"energies", "widths"}), ("rtn-4.2bits", {"bits"})):
        folder, kept = runs[name]
        figures = [file.stem for file in folder.glob("*.png")]
        assert least <= set(figures)
        for figure in figures:
            assert kept.history[f"figures/{figure}._type"] == "image-file"
            with Image.open(kept.file(f"figures/{figure}")) as logged:
                assert logged.size == Image.open(folder / f"{figure}.png").size


def test_the_log_is_uploaded(runs):
    for folder, kept in runs.values():
        assert "log.txt" in kept.files
        uploaded = (kept.folder / "files" / "log.txt").read_text()
        assert uploaded and (folder / "log.txt").read_text().startswith(uploaded)


def test_artifacts_that_are_asked_for_name_their_base(runs):
    folder, kept = runs["camera_p-40"]
    checkpoint = Path(json.loads((folder / "compress.json").read_text())["checkpoint"])
    asked = {a.type: a for a in kept.artifacts.values() if a.type != "run_table"}
    assert asked.keys() == {"plan", "statistics"}
    for kind, artifact in asked.items():
        (file,) = artifact.files.values()
        assert file.read_bytes() == (checkpoint / f"{kind}.safetensors").read_bytes()
        assert artifact.about["base_model"]["name"] == kept.config["model"]["name"]
        assert artifact.about["sparsity"] == 0.4
    assert not [a for a in runs["dense"][1].artifacts.values() if a.type != "run_table"]


def test_tables_are_synced_from_the_run_folder_alone(output, runs, sweep):
    for kept in (sweep, *(kept for _, kept in runs.values())):
        staged = [file for a in kept.artifacts.values() for file in a.files.values()]
        assert staged and all(file.is_relative_to(output.folder) for file in staged)
        assert all(file.exists() for file in staged)


def test_a_sweep_has_the_table_of_the_paper(output, runs, sweep):
    (files,) = output.sweeps()
    table = sweep.table("tables/paper")
    (score,) = [column for column in table if column.endswith("wikitext2↓")]
    assert {"Ratio", "Avg↑"} <= set(table)
    assert len(table) >= 3
    assert all(isinstance(value, float) for value in table[score])
    asked = {kept.summary["perplexity/wikitext2"] for _, kept in runs.values()}
    tables = [sweep.table(f"tables/{key}") for key in sweep.config["tables"]]
    shown = {value for one in tables if score in one for value in one[score]}
    assert sorted(shown) == pytest.approx(sorted(asked))
    assert set(sweep.config["runs"]) == {folder.name for folder, _ in runs.values()}
    assert (files.folder / "table.md").exists()


def test_a_sweep_has_perplexity_over_sparsity_and_the_report(runs, sweep):
    plotted = sweep.table("curves/wikitext2_sparsity_table")
    assert set(plotted["method"]) == {"Camera-P"}
    assert plotted["sparsity"].tolist() == [0, 20, 40]
    names = ("dense", "camera_p-20", "camera_p-40")
    perplexities = [runs[name][1].summary["perplexity/wikitext2"] for name in names]
    assert plotted["wikitext2"].tolist() == pytest.approx(perplexities)
    assert len(sweep.table("curves/wikitext2_bits_table")) == 1
    assert sweep.history["report._type"] == "html-file"
    page = sweep.file("report").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "camera_p" in page


def tags(found: tuple[Path, Kept]) -> set[str]:
    return set(found[1].run.tags)


def curves(kept: Kept) -> set[str]:
    return {key for key in kept.history if key.startswith("layer/")}


def numbers(kept: Kept) -> set[str]:
    """Names of single numbers in the summary: files have a type, a size, ..."""
    named = {key for key in kept.summary if "." not in key and not key.startswith("_")}
    return {key for key in named if isinstance(kept.summary[key], int | float)}


def answers(model, tokenizer, names, **_) -> dict:
    """What lm-eval might say of the two tasks; boolq has no acc_norm."""
    (name,) = names
    scores = {"acc": 0.4, "acc_stderr": 0.01, "acc_norm": 0.6, "acc_norm_stderr": 0.02}
    if name == "boolq":
        scores |= {"acc_norm": None, "acc_norm_stderr": None}
    return {name: {**scores, "data_hash": "0", "seconds": 0.0}}
