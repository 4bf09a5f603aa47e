"""The scripts of examples/ run on a tiny model, and the page lists them all."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.runs.documents import ROOT

FOLDER = ROOT / "examples"
SCRIPTS = sorted(file for file in FOLDER.glob("*.py") if not file.name.startswith("_"))
RUN = """
import runpy, sys, tempfile
tempfile.tempdir = sys.argv[3]
scripts, sys.argv = sys.argv[4:], sys.argv[:3]
for script in scripts:
    sys.modules.pop("_common", None)
    print("##", script)
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def printed(checkpoints, data_folder, tmp_path_factory):
    """What each script printed; all in one process, as importing torch takes longest."""
    places = [str(checkpoints("qwen2_moe")), str(data_folder), str(tmp_path_factory.mktemp("out"))]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *places, *map(str, SCRIPTS)],
        env={**os.environ, "PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("## ")[1:]
    return {part.partition("\n")[0].rpartition("/")[2]: part.partition("\n")[2] for part in parts}


def test_every_script_is_on_the_page():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) >= 4
    assert [script.name for script in SCRIPTS if f"]({script.name})" not in page] == []


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("compress.py", r"removed (39|40)\.\d% of the experts"),
        ("evaluate.py", "compressed  c4"),
        ("quantise.py", r"'stored': 2\.[45]"),
        ("own_method.py", "largest    narrowest expert keeps"),
    ],
)
def test_a_script_says_what_it_did(printed, script, told):
    assert re.search(told, printed[script])
