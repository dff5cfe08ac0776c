"""The shipped proofs against every fault of the shipped functions: what none notices is on the list, and no more."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from reconciler import desired, mutate
from tests.servers import PROJECT, Database

if TYPE_CHECKING:
    from pathlib import Path

EQUIVALENT = PROJECT / "examples" / "dieu45" / "equivalent-mutants.yaml"


def silent(done: int, of: int, survivors: int) -> None:
    """Nobody waits for a line."""


@pytest.mark.slow
def test_every_fault_that_makes_a_difference_is_noticed(dieu45: Database, tmp_path: Path) -> None:
    """1,831 of them, some minutes."""
    shutil.copytree(PROJECT / "state", tmp_path / "state")
    extensions = sorted(name for (name,) in dieu45.execute("SELECT extname FROM pg_extension"))
    governance = tmp_path / "state" / "governance.yaml"
    here = f"  targets:\n    here: {{vars: {{extensions: {json.dumps(extensions)}}}}}\n"
    governance.write_text(governance.read_text().replace("  targets:\n", here))

    wanted = desired.load(tmp_path / "state", "here")
    found = mutate.mutate(dieu45.dsn, tmp_path / "state", wanted, silent, equivalent=EQUIVALENT)

    assert [each for each in found.survivors if not each.because] == []
    assert (found.outcome, mutate.exit_code(found)) == ("no_changes", 0)
    # The list holds no mutant that is noticed after all, and none that is gone.
    assert found.unknown == ()
    assert {each.id for each in found.survivors} == mutate._known(EQUIVALENT).keys()
    assert sum(tally.planted for tally in found.mutants.values()) > 1800
    assert (found.unparsed, found.idle) == ({}, ())
