"""TAB: commands, and the settings of what runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.commands import completion
from experiments.commands.subcommands import SUBCOMMANDS

ROOT = Path(__file__).resolve().parents[3]


def answers(line):
    return completion.answers(line, [*SUBCOMMANDS])


def test_the_first_word_is_a_command():
    assert answers("camera ") == [f"{name} " for name in SUBCOMMANDS]
    assert answers("camera ta") == ["tables "]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("camera run method=camera_q", ["method=camera_q", "method=camera_q_dagger"]),
        ("camera run method=camera_p spar", ["sparsity=", "sparsity_of="]),
        ("camera sweep method=random method.se", ["method.seed="]),
        ("camera evaluate some/model evaluation=pe", ["evaluation=perplexity"]),
    ],
)
def test_settings_are_completed_by_the_configuration(line, expected):
    assert answers(line) == expected


@pytest.mark.parametrize("line", ["camera tables out", "camera evaluate some/mo", "camera "[:6]])
def test_files_are_left_to_the_shell(line):
    assert not [answer for answer in answers(line) if answer.strip() not in SUBCOMMANDS]


def test_the_script_completes_in_bash(capsys):
    assert completion.main(["bash"], [*SUBCOMMANDS]) == 0
    script = capsys.readouterr().out
    called = "import sys; from experiments.commands.subcommands import main; sys.exit(main())"
    asked = f"""{script}
camera() {{ "{sys.executable}" -c '{called}' "$@"; }}
COMP_LINE="camera run experiment=mai"; COMP_POINT=${{#COMP_LINE}}; _camera
printf '<%s>' "${{COMPREPLY[@]}}"
COMP_LINE="camera tab"; COMP_POINT=${{#COMP_LINE}}; _camera
printf '<%s>' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", asked],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "<experiment=main><tables >", done.stderr


def test_zsh_takes_the_script_of_bash(capsys):
    completion.main(["zsh"], [*SUBCOMMANDS])
    assert capsys.readouterr().out.startswith(
        "autoload -U +X bashcompinit && bashcompinit\n_camera"
    )
