"""Scopes of two governance names: what both would own."""

from __future__ import annotations

import itertools
import re

import pytest

from reconciler import setup
from reconciler.model import glob_regex
from tests import states


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a*", "ab", True),
        ("a*", "*b", True),
        ("a*", "b*", False),
        ("a?", "ab", True),
        ("a?", "a", False),
        ("?", "*", True),
        ("*", "", True),
        ("", "", True),
        ("", "a", False),
        ("queue.*", "queue.job.*", True),
        ("queue.*", "shop.*", False),
        ("fn_*_x", "fn_a*", True),
        ("*a*b*", "b*a", True),
        ("a*b", "b*a", False),
    ],
)
def test_globs_that_meet(one: str, other: str, together: bool) -> None:
    assert setup.meet(one, other) is together
    assert setup.meet(other, one) is together


def test_meeting_is_having_a_name_in_common() -> None:
    names = ["".join(letters) for size in range(5) for letters in itertools.product("ab", repeat=size)]
    globs = ["".join(letters) for size in range(4) for letters in itertools.product("ab*?", repeat=size)]
    matched = {glob: {name for name in names if re.fullmatch(glob_regex(glob), name)} for glob in globs}
    for one, other in itertools.combinations(globs, 2):
        # Names of up to four letters suffice for globs of up to three characters, but for two stars around letters.
        if matched[one] & matched[other]:
            assert setup.meet(one, other), (one, other)
        elif setup.meet(one, other):
            assert (one + other).count("*") >= 2, (one, other)


def test_every_overlap_is_named() -> None:
    scope = {
        "gates": [{"store": "settings", "matching": "app.*"}],
        "functions": [{"schema": "public", "matching": "fn_*"}],
        "markers": [{"table": "public.workers"}],
    }
    stores = {"settings": states.STORE.dump()}
    ours = {"scope": scope, "stores": stores}
    assert setup.overlaps(ours, ours) == [
        "gates app.* and app.* of public.settings",
        "functions fn_* and fn_* of schema public",
        "markers of public.workers",
    ]
    apart = {
        "gates": [{"store": "settings", "matching": "other.*"}],
        "functions": [{"schema": "private", "matching": "fn_*"}],
        "markers": [{"table": "public.other"}],
    }
    assert setup.overlaps(ours, {"scope": apart, "stores": stores}) == []
