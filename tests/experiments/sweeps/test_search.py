"""Sweepers that search get the number that `objective` names; W&B's agents a run of their own."""

import json
import shlex
import sys

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from tests.helpers.runs.composing import command, tiny
from tests.helpers.runs.documents import blocks, page
from tests.helpers.runs.offline_wandb import read_back


@pytest.fixture
def overrides(checkpoints, data_folder, tmp_path):
    quick = ("evaluation.perplexity=[wikitext2]", "evaluation.blocks=1")
    return [*tiny(checkpoints("qwen2_moe"), data_folder, tmp_path), *quick]


def the_search() -> list[str]:
    """The arguments of the example with Optuna in docs/wandb.md."""
    (line,) = [line for line in blocks(page("wandb.md"), "text") if "optuna" in line]
    return shlex.split(line)[2:]


def test_optuna_searches_as_the_page_says(overrides, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    asked = [said for said in the_search() if "n_trials" not in said]
    fixed = [*overrides, "hydra.sweeper.sampler.seed=1", "hydra.sweeper.n_trials=2"]
    assert command(*asked, *fixed) == 0
    (sweep,) = (tmp_path / "sweeps").iterdir()
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert found["best_params"].keys() == {"alpha", "sparsity"}
    trials = {}
    for run in (tmp_path / "runs").iterdir():
        asked = json.loads((run / "settings.json").read_text())["settings"]
        metrics = json.loads((run / "metrics.json").read_text())
        trials[asked["alpha"], asked["sparsity"]] = metrics["perplexity"]["wikitext2"]
    assert len(trials) == 2
    best = min(trials, key=trials.get)
    assert found["best_value"] == trials[best]
    assert (found["best_params"]["alpha"], found["best_params"]["sparsity"]) == best


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ([], "objective=average or objective=perplexity/wikitext2"),
        (["objective=perplexity/c4"], "one of perplexity/wikitext2, sparsity/moe"),
        (["objective=bits/stored"], "objective=bits/stored isn't measured"),
    ],
)
def test_a_search_without_its_number_is_refused_before_it_computes(
    objective, told, overrides, tmp_path, capsys, caplog
):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1")
    assert command(*search, *overrides, *objective, "alpha=choice(0.5,0.9)") != 0
    assert told in caplog.text + "".join(capsys.readouterr())
    assert not list(tmp_path.rglob("metrics.json")) and not (tmp_path / "checkpoints").exists()


def test_hydras_own_sweeper_needs_no_number(overrides, tmp_path):
    basic = ("-m", "hydra/sweeper=basic", "method=dense")
    assert command(*basic, *overrides) in (0, None)
    assert len(list(tmp_path.rglob("metrics.json"))) == 1


def test_a_run_of_an_agent_is_told_under_the_agents_id_also_when_it_is_done(
    overrides, tmp_path, monkeypatch
):
    """The command is made by W&B's own code; its server, which chooses the values, is left out."""
    (text,) = blocks(page("wandb.md"), "yaml")
    asked = yaml.safe_load(text)
    for trial in ("first", "second"):
        wandb.teardown()  # an agent starts a process for each, which reads the environment
        monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        values = {"args": {"alpha": {"value": 0.5}, "sparsity": {"value": 0.4}}}
        words = create_sweep_command([*asked["command"]])
        given = create_sweep_command_args(values)["args_no_hyphens"]
        places = {"${env}": [], "${interpreter}": [sys.executable], "${args_no_hyphens}": given}
        places["${program}"] = [asked["program"]]
        line = [part for word in words for part in places.get(word, [word])]
        assert line[:2] == [sys.executable, "main.py"]
        offline = ("tracker=wandb", "tracker.mode=offline")  # there is no server
        assert command(*line[2:], *overrides, *offline) == 0
        (run,) = (tmp_path / "runs").iterdir()
        kept = read_back(run)[-1]
        assert kept.run.run_id == trial and kept.run.sweep_id == "abc"
        assert kept.config["alpha"] == 0.5 and kept.config["sparsity"] == 0.4
        assert asked["metric"]["name"] in kept.summary
        assert set(asked["parameters"]) <= kept.config.keys()
    wandb.teardown()
