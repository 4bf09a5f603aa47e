"""Values on the command line that a setting can't have, told before Hydra reads them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from difflib import get_close_matches
from enum import Enum
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, QuotedString, Sweep
from omegaconf import BooleanNode, EnumNode, FloatNode, IntegerNode, OmegaConf
from omegaconf.errors import ValidationError

from camera.runtime.errors import CameraError
from camera.runtime.values import renaming
from experiments.config.arguments import UNREADABLE, parsed
from experiments.config.schema import Config, group_types

WANTED = {IntegerNode: "a whole number", FloatNode: "a number", BooleanNode: "true or false"}
SEVERAL = ("-m", "--multirun", "experiment=", "+experiment=", "hydra.mode=", "hydra/sweeper=")


def check_typed(arguments: Sequence[str]) -> None:
    """CameraError for a value of another type, for none of the choices, for several without `-m`.

    What no type is known of is left to Hydra, and so are sweeps that aren't plain lists.
    """
    one = not any(argument.startswith(SEVERAL) for argument in arguments)
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        nodes = _nodes(key, arguments) if equals else []
        value = parsed(argument) if nodes else UNREADABLE
        if value is UNREADABLE or (isinstance(value, Sweep) and not isinstance(value, ChoiceSweep)):
            continue
        values = value.list if isinstance(value, ChoiceSweep) else [value]
        if len(values) > 1 and one:
            raise CameraError(
                f"{argument} are several values: `camera sweep`, or -m, makes a run of each."
            )
        for each in values:
            _check(key, each.text if isinstance(each, QuotedString) else each, nodes)


def _nodes(key: str, arguments: Sequence[str]) -> list[Any]:
    """What the key is in each class that may have it: of the chosen one, else of all."""
    group, _, name = key.rpartition(".")
    if group in group_types():
        chosen = [a.partition("=")[2] for a in arguments if a.startswith(f"{group}=")]
        known = group_types()[group]
        names = chosen[-1].split(",") if chosen else list(known)
        holders = [OmegaConf.structured(known[each]) for each in names if each in known]
    else:
        whole = OmegaConf.structured(Config)
        holders = [OmegaConf.select(whole, group) if group else whole]
    held = [holder for holder in holders if OmegaConf.is_dict(holder) and name in holder]
    return [holder._get_node(name) for holder in held]


def _check(key: str, value: Any, nodes: Sequence[Any]) -> None:
    refused = [node for node in nodes if not _takes(node, value)]
    if len(refused) < len(nodes):
        return
    group, _, name = key.rpartition(".")
    if told := renaming(group, name, value):
        raise CameraError(told)
    shown = "null" if value is None else value
    if isinstance(refused[0], EnumNode):
        types = [node.enum_type for node in refused if isinstance(node, EnumNode)]
        options = list(dict.fromkeys(each.value for kind in types for each in kind))
        near = get_close_matches(str(value), options, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise CameraError(f"{key}={shown} is none of {', '.join(options)}{hint}")
    wanted = next((WANTED[kind] for kind in WANTED if isinstance(refused[0], kind)), None)
    if wanted:
        raise CameraError(f"{key}={shown}: give {wanted}.")


def _takes(node: Any, value: Any) -> bool:
    if isinstance(value, str) and "${" in value:
        return True
    try:
        deepcopy(node)._set_value(value.value if isinstance(value, Enum) else value)
    except ValidationError:
        return False
    return True
