"""Beside the tests: which cases of a long list belong to a sample that runs more often than the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from _pytest.mark.structures import ParameterSet


def smoke(
    cases: Iterable[Any], every: int, others: pytest.MarkDecorator | Sequence[pytest.MarkDecorator] = ()
) -> list[ParameterSet]:
    """The cases for `parametrize`: one in `every`, from the first, runs on every server of the matrix.

    others: the marks of the rest, which is in `make test` unless they say otherwise.
    """
    return _some(cases, every, pytest.mark.smoke, others)


def slow(cases: Iterable[Any], every: int) -> list[ParameterSet]:
    """The cases for `parametrize`: one in `every`, from the first, is in `make test`; the others take their time."""
    return _some(cases, every, (), pytest.mark.slow)


def _some(cases: Iterable[Any], every: int, chosen: Any, others: Any) -> list[ParameterSet]:
    return [
        pytest.param(*(case if type(case) is tuple else (case,)), marks=others if number % every else chosen)
        for number, case in enumerate(cases)
    ]
