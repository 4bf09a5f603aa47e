"""TAB completion of `camera` in bash and zsh: `eval "$(camera completion bash)"`.

Commands are completed here, the settings of `run`, `sweep` and `evaluate` by Hydra, whose own
completion knows one command only; all else is the shell's, names of files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib import import_module

SCRIPT = """_camera() {
    local IFS=$'\\n'
    COMPREPLY=($(COMP_LINE="${COMP_LINE:0:$COMP_POINT}" camera completion answers 2>/dev/null))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _camera camera
"""
SETTINGS = {"run": 2, "sweep": 2, "evaluate": 3}  # the words before the first setting


def main(arguments: Sequence[str], commands: Sequence[str]) -> int:
    """The command, told the names of all; its exit code."""
    parser = argparse.ArgumentParser(prog="camera completion", description=__doc__)
    parser.add_argument("shell", choices=["bash", "zsh"], help="whose script to print")
    if list(arguments) == ["answers"]:  # asked by the script, not by people
        print("\n".join(answers(os.environ.get("COMP_LINE", ""), commands)))
        return 0
    if parser.parse_args(arguments).shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(SCRIPT, end="")
    return 0


def answers(line: str, commands: Sequence[str]) -> list[str]:
    """What may stand at the end of a command line that begins with `camera`."""
    words = line.split()
    typed = "" if not line or line[-1].isspace() else words.pop()
    if len(words) <= 1:
        return [f"{name} " for name in commands if name.startswith(typed)]
    if words[1] not in SETTINGS or len(words) < SETTINGS[words[1]]:
        return []
    return _settings(words[SETTINGS[words[1]] :], typed)


def _settings(words: list[str], typed: str) -> list[str]:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    bash = import_module("hydra._internal.core_plugins.bash_completion")
    schema = import_module("experiments.config.schema")
    with initialize_config_dir(str(schema.CONF), version_base="1.3"):
        plugin = bash.BashCompletion(GlobalHydra.instance().config_loader())
        return plugin._query(config_name="config", line=" ".join([*words, typed]))
