"""Several processes share the calibration samples and agree on the plan."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

import camera

JOB = textwrap.dedent("""
    import json, sys
    import camera
    from camera.parallel import process_group, rank

    source, out, data, options = sys.argv[1:]
    with process_group():
        result = camera.compress(
            source, "camera_p", out, data=data, device="cpu", progress=False,
            calibration=camera.Calibration(samples=5, length=16), **json.loads(options),
        )
        with open(f"{out}-{rank()}.json", "w") as file:  # what ranks print may run together
            json.dump(result.widths, file)
""")


def torchrun(script, *arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={processes}", str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def weights(folder):
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.4}, {"sparsity": 0.4, "rank_scope": "global"}],
    ids=["layer by layer", "all layers at once"],
)
def test_two_processes_keep_what_one_keeps(options, checkpoints, data_folder, tmp_path):
    source, script = checkpoints("qwen2_moe"), tmp_path / "job.py"
    script.write_text(JOB)
    alone = camera.compress(
        source,
        "camera_p",
        tmp_path / "one",
        data=str(data_folder),
        device="cpu",
        progress=False,
        calibration=camera.Calibration(samples=5, length=16),
        **options,
    )
    done = torchrun(script, source, tmp_path / "two", data_folder, json.dumps(options))
    assert done.returncode == 0, done.stderr
    said = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2)]
    assert said == [alone.widths] * 2
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
