"""What README.md tells the reader to type works: its commands, its Python, its settings."""

import functools
import re
import shlex
import subprocess
import sys

import pytest

import camera
from camera.__main__ import main as camera_main
from experiments.commands.subcommands import SUBCOMMANDS
from experiments.config.location import CONF
from tests.helpers.runs.composing import choices, command, config_of

ROOT = CONF.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
LINES = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "console"
    for line in block.splitlines()
    if line
]
SNIPPETS = [block for language, block in BLOCKS if language == "python"]
RUNS = [line[2:] for line in LINES if line[:2] == ["python", "main.py"]]
MODULES = [
    text.removeprefix("python -m ").split()
    for text in INLINE
    if text.startswith(("python -m ", "camera export"))
]
SETTINGS = [text.split() for text in INLINE if re.fullmatch(r"([\w./]+=[\w./]+ ?)+", text)]


@pytest.fixture(scope="module")
def output(checkpoints, data_folder, tmp_path_factory):
    """The output folder of one finished run, in the place of the reader's `outputs`."""
    folder = tmp_path_factory.mktemp("readme") / "outputs"
    assert command(*small(["sparsity=0.4"], checkpoints, data_folder, folder)) == 0
    return folder


def small(arguments, checkpoints, data_folder, output):
    """The arguments on a tiny model and little text; settings that the reader must fill in too."""
    own = ("model.path", "data", "output")
    kept = [text for text in arguments if text.split("=")[0] not in own]
    places = {"model.path": checkpoints("qwen3_moe"), "data": data_folder, "output": output}
    limits = ["evaluation.tasks=[]", "evaluation.blocks=1", "calibration.samples=4"]
    given = [f"{key}={place}" for key, place in places.items()]
    return [*kept, *given, *limits, "calibration.length=48", "tracker=none"]


def test_the_readme_is_read():
    assert len(RUNS) >= 2 and len(SNIPPETS) >= 2 and len(MODULES) >= 1


def test_every_line_of_a_console_block_is_of_a_kind_tested_here():
    assert {tuple(line[: 1 + (line[0] == "python")]) for line in LINES} <= {
        ("camera",),
        ("git",),
        ("make",),
        ("python", "main.py"),
    }


@pytest.mark.parametrize("name", [line[1] for line in LINES if line[0] == "camera"])
def test_camera_has_the_subcommand(name):
    assert name in SUBCOMMANDS


@pytest.mark.parametrize("name", ["tables", "report"])
def test_camera_makes_pages_of_an_output_folder(name, output):
    assert SUBCOMMANDS[name].call(f"camera {name}", [str(output)]) in (0, None)
    page = output / {"tables": "table.md", "report": "report.html"}[name]
    assert "qwen3_moe" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("line", [line for line in LINES if line[0] == "make"], ids=" ".join)
def test_make_has_the_target(line):
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in line[1:])


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_a_run_of_main_ends_in_a_table(arguments, checkpoints, data_folder, tmp_path, capfd):
    assert command(*small(arguments, checkpoints, data_folder, tmp_path)) == 0
    assert "40%" in capfd.readouterr().out.replace(" ", "")


@pytest.mark.parametrize("arguments", SETTINGS, ids=" ".join)
def test_every_setting_composes(arguments):
    config_of(*arguments)


def test_every_method_is_told():
    assert [name for name in choices("method") if name not in PROSE] == []


def test_snippets_run_one_after_the_other(output, checkpoints, data_folder, tmp_path, monkeypatch):
    (compressed,) = (output / "checkpoints").iterdir()
    monkeypatch.setattr(camera, "compress", functools.partial(camera.compress, data=data_folder))
    names: dict = {}
    for snippet in SNIPPETS:
        for pattern, place in (
            (r'"outputs/checkpoints/[^"]*"', compressed),
            (r'"[\w-]+/[\w.-]+"', checkpoints("qwen3_moe")),
            (r'"smaller"', tmp_path / "smaller"),
        ):
            snippet = re.sub(pattern, repr(str(place)), snippet)
        snippet = re.sub(r"samples=\d+, length=\d+", "samples=4, length=48", snippet)
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["model"].config.quantization_config.quant_method == "camera-moe"
    assert names["result"].sparsity["moe"] == pytest.approx(0.4, abs=0.02)
    assert (tmp_path / "smaller" / "camera.json").exists()


@pytest.mark.parametrize("arguments", MODULES, ids=" ".join)
def test_modules_do_what_the_readme_says(arguments, output, tmp_path, monkeypatch):
    match arguments:
        case ["camera", "export", "FROM", "TO"]:
            (compressed,) = (output / "checkpoints").iterdir()
            places = [str(compressed), str(tmp_path / "plain")]
            monkeypatch.setattr(sys, "argv", ["camera", "export", *places])
            camera_main()
            assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
        case _:
            pytest.fail(f"python -m {' '.join(arguments)} is tested nowhere: teach this test.")


def test_modules_start_as_commands():
    """`python -m` finds what the tests above call in this process, and warns of nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "camera", "export", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--width-multiple" in done.stdout
    assert "Warning" not in done.stderr


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
