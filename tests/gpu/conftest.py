"""A real card, and where its numbers go."""

from collections.abc import Callable

import pytest

from tests.helpers.machine.gpu_report import MARK, NO_CARD, PROPERTY, Measured, real_card


@pytest.fixture(scope="session")
def card(request) -> str:
    """The card, for these tests alone; skips without one."""
    found = real_card()
    if found is None:
        pytest.skip(NO_CARD)
    if request.config.option.markexpr != MARK:
        pytest.skip(f"only `pytest -m {MARK}` measures: it has the card for itself, for minutes")
    return found


@pytest.fixture
def measured(request) -> Callable[..., None]:
    """measured(title, what, value, unit, goal): a row of the report."""

    def row(title: str, what: str, value: float, unit: str, goal: object = "") -> None:
        found = Measured(title, what, float(value), unit, str(goal))
        request.node.user_properties.append((PROPERTY, found))

    return row
