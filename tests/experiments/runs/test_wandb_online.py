"""Online an interrupted run of a folder goes on by its id; W&B's own part is a stand-in here."""

from types import SimpleNamespace

import pytest
import wandb

from experiments.runs import wandb_files
from experiments.runs.wandb_tracker import WandbTracker

ABOUT = {"name": "camera_p-40", "group": None, "job_type": "camera_p", "tags": [], "config": {}}


class Server:
    """What W&B knows of runs by their ids, and what it was asked for."""

    def __init__(self):
        self.runs, self.asked = {}, []

    def init(self, *, id=None, resume=None, **about):
        self.asked.append({"id": id, "resume": resume, **about})
        resumed = resume == "allow" and id in self.runs
        known = self.runs.setdefault(id, SimpleNamespace(rows=[], summary={}))
        return SimpleNamespace(
            resumed=resumed,
            summary=known.summary,
            log=known.rows.append,
            define_metric=lambda *_, **__: None,
            use_artifact=lambda artifact: known.rows.append({"used": artifact.name}),
            log_artifact=lambda artifact: known.rows.append({"logged": artifact.type}),
        )


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(wandb, "init", server.init)
    return server


def test_a_run_that_goes_on_is_the_same_run_and_tells_no_layer_twice(server, tmp_path):
    for done in (2, 3):
        tracker = WandbTracker("online")
        tracker.start(tmp_path, **ABOUT)
        for layer in range(done):
            tracker.log_layer(layer, {"seconds": 1.0})
    (run,) = server.runs.values()
    assert [row["layer"] for row in run.rows] == [0, 1, 2]
    assert {asked["id"] for asked in server.asked} == {wandb_files.online_id(tmp_path)}


def test_other_folders_are_other_runs(server, tmp_path):
    for name in ("a", "b"):
        WandbTracker("online").start(tmp_path / name, **ABOUT)
    assert len(server.runs) == 2


def test_offline_no_id_is_fixed(server, tmp_path):
    WandbTracker("offline").start(tmp_path, **ABOUT)
    assert server.asked[0]["id"] is None and not (tmp_path / "wandb" / "id").exists()


def test_the_run_of_an_agent_is_the_agents(server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "theirs")
    WandbTracker("online").start(tmp_path, **ABOUT)
    assert server.asked[0]["id"] is None and "group" not in server.asked[0]


def test_an_artifact_online_names_its_base_as_input(server, tmp_path, monkeypatch):
    from experiments.runs.tracker import Result

    plan = tmp_path / "plan.safetensors"
    plan.write_bytes(b"plan")
    tracker = WandbTracker("online", artifacts=["plan"])
    tracker.start(tmp_path, **ABOUT)
    results = [Result(kind, f"a-{kind}", plan, {}) for kind in ("plan", "statistics")]
    tracker.log_results(results, {"name": "tiny moe"})
    (run,) = server.runs.values()
    assert run.rows == [{"used": "tiny-moe"}, {"logged": "plan"}]
