"""What a sweep asks for: a union of products of choices, as Hydra's overrides for each job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException


def overrides_of(
    params: Mapping[str, Any],
    grids: Mapping[str, Sequence[Mapping[str, Any]] | None],
    arguments: Sequence[str],
    loader: ConfigLoader,
) -> list[tuple[str | None, list[str]]]:
    """For each job the name of its grid, and its overrides, in order.

    A choice is a value, a list of them, or a string in Hydra's grammar ("0.2,0.4", "range(1,4)").
    `arguments`, the command line, win over a grid and a grid over `params`; a method that wins
    also does away with the weaker one's `method.` keys, which it may not know. Without grids there
    is one, unnamed. Raises Hydra's own error for a grid that is no list of mappings.
    """
    parser = OverridesParser.create(config_loader=loader)
    given = [override.key_or_group for override in parser.parse_overrides(list(arguments))]
    found = []
    for name, products in (grids or {None: [{}]}).items():
        for product in _mappings(name, products):
            said = _without(params, product) | dict(product)
            lines = [f"{key}={_choices(value)}" for key, value in _without(said, given).items()]
            parsed = parser.parse_overrides([*lines, *arguments])
            (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
            found += [(name, job) for job in jobs]
    return found


def _mappings(
    name: str | None, products: Sequence[Mapping[str, Any]] | None
) -> Sequence[Mapping[str, Any]]:
    products = [] if products is None else products
    if isinstance(products, str | Mapping) or not all(isinstance(p, Mapping) for p in products):
        raise ConfigCompositionException(
            f"hydra.sweeper.grids.{name} must be a list of mappings: [{{method: dense}}]."
        )
    return products


def _without(weaker: Mapping[str, Any], stronger: Iterable[str]) -> dict[str, Any]:
    taken = set(stronger)
    settings = "method." if "method" in taken else None
    return {
        key: value
        for key, value in weaker.items()
        if key not in taken and not (settings and key.startswith(settings))
    }


def _choices(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(_choices(each) for each in value)
    return "null" if value is None else str(value)
