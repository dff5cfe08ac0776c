"""Beside the tests: which cases of a long list belong to a sample that runs more often than the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _pytest.mark.structures import ParameterSet


def smoke(cases: Iterable[Any], every: int) -> list[ParameterSet]:
    """The cases for `parametrize`: one in `every`, from the first, runs on every server of the matrix."""
    return [
        pytest.param(*_values(case), marks=() if number % every else pytest.mark.smoke)
        for number, case in enumerate(cases)
    ]


def slow(cases: Iterable[Any], every: int) -> list[ParameterSet]:
    """The cases for `parametrize`: one in `every`, from the first, is in `make test`; the others take their time."""
    return [
        pytest.param(*_values(case), marks=pytest.mark.slow if number % every else ())
        for number, case in enumerate(cases)
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if type(case) is tuple else (case,)
