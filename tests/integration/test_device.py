"""A second device in every run of the tests: a fake one, in processes that have it.

tests/device runs on it as `cuda`, and under another name in `make test-device`; torchrun's ranks
share it.
"""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

import camera
from camera.runtime.distributed import _have_their_own
from experiments.config.location import CONF
from tests import fake_device
from tests.fake_device.build import CannotBuildError, load
from tests.helpers.checkpoints import tensors_of
from tests.helpers.machine.processes import python_path, torchrun
from tests.helpers.methods import method_of

CASES = ("camera_p", "camera_q", "d2_moe")
JOB = textwrap.dedent("""
    import json, os, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import camera
    from camera.runtime.distributed import process_group, rank
    from camera.runtime.errors import CameraError
    from camera.streaming.skeleton import MetaModel
    from tests.helpers.methods import method_of

    source, folder, data, jobs = sys.argv[1:]
    used, load = [], MetaModel.load_layer

    def noted(self, index, *args):
        layer = load(self, index, *args)
        used.append(str(next(layer.parameters()).device))
        return layer

    MetaModel.load_layer = noted
    with process_group():
        for case, device in json.loads(jobs):
            try:
                camera.compress(
                    source, method_of(case), Path(folder) / f"{case}-{device}", data=data,
                    device=device, progress=False,
                    calibration=camera.Calibration(source="wikitext2", samples=4, length=24),
                )
                said = sorted(set(used))
            except CameraError as error:
                said = str(error)
            used.clear()
            with (Path(folder) / f"rank-{rank()}").open("a") as file:
                file.write(json.dumps(said) + "\\n")
""")


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    try:
        load()
    except CannotBuildError as error:
        pytest.skip(f"no fake device: {error}")


def test_the_tests_of_a_device_pass_on_the_fake():
    asked = ("-n", "0", "-rs", "--accelerator=cuda:2", "tests/device")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *asked],
        cwd=CONF.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert "SKIPPED" not in done.stdout, done.stdout[-2000:]


def run(folder, fake, *arguments) -> list[list]:
    """What each of two ranks said of each job."""
    script = folder / "job.py"
    script.write_text(JOB)
    environment = fake_device.environment(fake)
    environment["PYTHONPATH"] = python_path(environment["PYTHONPATH"])
    done = torchrun(script, *arguments, **environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [[json.loads(line) for line in (folder / f"rank-{r}").open()] for r in range(2)]


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints("qwen2_moe", num_hidden_layers=2)


def test_each_rank_takes_its_card_and_the_sums_are_those_of_one(source, data_folder, tmp_path):
    jobs = [(case, "auto") for case in CASES]
    said = run(tmp_path, "camdev:2", source, tmp_path, data_folder, json.dumps(jobs))
    assert said == [[[f"camdev:{rank}"]] * len(jobs) for rank in range(2)]
    pairs = []
    for case in CASES:
        camera.compress(
            source,
            method_of(case),
            tmp_path / case,
            data=str(data_folder),
            calibration=camera.Calibration(source="wikitext2", samples=4, length=24),
            device="cpu",
            progress=False,
        )
        pairs.append((tensors_of(tmp_path / f"{case}-auto"), tensors_of(tmp_path / case)))
    pruned, quantised, factored = pairs
    assert all(torch.equal(pruned[0][name], pruned[1][name]) for name in pruned[1])
    # in the first layer, whose inputs are the same, codes hang on the sums of Hessians alone
    first = [name for name in quantised[1] if ".layers.0." in name and "expert" in name]
    same = sum((quantised[0][name] == quantised[1][name]).sum().item() for name in first)
    assert same > 0.9 * sum(quantised[1][name].numel() for name in first)
    # the base of both ranks' Fisher and counts
    bases = [name for name in factored[1] if name.endswith("experts.gate_up_proj")]
    for name in bases:
        torch.testing.assert_close(factored[0][name], factored[1][name], rtol=1e-4, atol=1e-5)
    assert bases


def test_one_card_serves_two_processes_on_the_cpu_and_no_more(source, data_folder, tmp_path):
    jobs = json.dumps([("camera_p", "cpu"), ("camera_p", "auto")])
    for on_cpu, refused in run(tmp_path, "cuda:1", source, tmp_path, data_folder, jobs):
        assert on_cpu == ["cpu"]
        assert refused == (
            "device=auto: torchrun started 2 processes on this machine, which has 1 cuda: "
            "start it with --nproc-per-node=1, or set device=cpu."
        )
    assert not (tmp_path / "camera_p-auto").exists()


@pytest.mark.parametrize(
    ("everyone", "there", "apart"),
    [
        ([("a", "cuda:0", "nccl"), ("a", "cuda:1", "nccl")], True, True),
        ([("a", "cuda:0", "nccl"), ("b", "cuda:0", "nccl")], True, True),
        ([("a", "cuda:0", "nccl"), ("a", "cuda:0", "nccl")], True, False),
        ([("a", "cuda:0", "nccl"), ("a", "cuda:1", "nccl")], False, False),
        ([("a", "other:0", "gloo"), ("a", "other:1", "gloo")], True, False),
    ],
)
def test_cards_add_up_by_their_library_where_each_rank_has_one(everyone, there, apart, monkeypatch):
    monkeypatch.setattr(sys.modules["torch.distributed"], "is_nccl_available", lambda: there)
    assert _have_their_own(everyone) == apart
