"""action.yml: its scripts are run against a real database and an API on loopback that answers as GitHub's does."""

from __future__ import annotations

import json
import os
import re
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ruamel.yaml import YAML

from tests import tools
from tests.integration import governed
from tests.servers import PROJECT

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.integration.governed import Governed
    from tests.servers import Database

ACTION = PROJECT / "action.yml"
BOT = "github-actions[bot]"
TOKEN = "ghs_not-a-real-token"


class Api:
    """Comments of one pull request. `refuse`: the code that every write gets; `asked`: what came."""

    def __init__(self) -> None:
        self.comments: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.refuse: tuple[int, str] | None = None
        self.url = ""

    def add(self, login: str, body: str) -> None:
        number = len(self.comments) + 1
        self.comments.append(
            {
                "url": f"{self.url}/repos/shop/db/issues/comments/{number}",
                "html_url": f"https://example.org/shop/db/pull/7#{number}",
                "user": {"login": login},
                "body": body,
            }
        )

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((method, path))
        if self.refuse and method != "GET":
            return self.refuse[0], {"message": self.refuse[1]}
        if method == "GET" and (
            match := re.fullmatch(r"/repos/shop/db/issues/7/comments\?per_page=100&page=(\d+)", path)
        ):
            start = 100 * (int(match[1]) - 1)
            return 200, self.comments[start : start + 100]
        if method == "POST" and path == "/repos/shop/db/issues/7/comments":
            self.add(BOT, body["body"])
            return 201, self.comments[-1]
        if method == "PATCH" and (match := re.fullmatch(r"/repos/shop/db/issues/comments/(\d+)", path)):
            self.comments[int(match[1]) - 1]["body"] = body["body"]
            return 200, self.comments[int(match[1]) - 1]
        return 404, {"message": "Not Found"}


@pytest.fixture
def api() -> Iterator[Api]:
    found = Api()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            found.tokens.add(self.headers.get("Authorization", ""))
            code, said = found.answer(self.command, self.path, json.loads(data) if data else None)
            body = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PATCH = do_GET  # noqa: N815 - the names are http.server's

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as above
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


def script(name: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the action as its step does; GITHUB_OUTPUT and the summary are files in the folder."""
    path = f"{Path(sysconfig.get_path('scripts'))}:{os.environ['PATH']}"
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "HOME") if name in os.environ}
    files = {"GITHUB_OUTPUT": str(folder / "output"), "GITHUB_STEP_SUMMARY": str(folder / "summary")}
    for file in files.values():
        Path(file).touch()
    return tools.run(["bash", PROJECT / "action" / name], env={"PATH": path, **kept, **files, **variables}, cwd=folder)


def planned(shop: Governed, **variables: str) -> tuple[int, dict[str, str]]:
    (shop.root / "output").write_text("")
    given = {"STATE": str(shop.directory), "RECONCILER_DSN": shop.db.dsn, "OUT": str(shop.root / "out"), **variables}
    done = script("plan.sh", shop.root, **given)
    pairs = (line.partition("=") for line in (shop.root / "output").read_text().splitlines())
    return done.returncode, {name: value for name, _, value in pairs}


def commented(api: Api, folder: Path, body: str, **variables: str) -> subprocess.CompletedProcess[str]:
    file = folder / "comment.md"
    file.write_text(body)
    given = {
        "GITHUB_API_URL": api.url,
        "GITHUB_REPOSITORY": "shop/db",
        "NUMBER": "7",
        "AUTHOR": BOT,
        "TOKEN": TOKEN,
        "FILE": str(file),
    }
    done = script("comment.sh", folder, **{**given, **variables})
    assert TOKEN not in done.stdout + done.stderr
    return done


MARKER = "<!-- reconciler plan 0123456789abcdef0123456789abcdef -->"


# -------------------------------------------------------------------------------------------------------------- plan.sh


def test_the_outputs_of_a_plan(shop: Governed) -> None:
    code, found = planned(shop, RUN_URL="https://example.org/runs/1")
    assert (code, found["code"], found["outcome"], found["has-changes"]) == (0, "2", "changes", "true")
    document = json.loads((shop.root / "out/change.plan").read_text())
    assert found["digest"] == document["effect_digest"]
    comment = (shop.root / "out/comment.md").read_text()
    assert comment.startswith("<!-- reconciler plan ")
    assert "reconciler approve change.plan --as NAME" in comment
    assert (shop.root / "summary").read_text() == comment
    shop.settle()
    code, found = planned(shop)
    assert (code, found) == (0, {"code": "0", "outcome": "no_changes", "digest": "", "has-changes": "false"})


def test_a_blocked_plan_is_told_and_not_kept(shop: Governed) -> None:
    shop.settle()
    shop.sql("INSERT INTO app.job (id, actor) VALUES (77, ' ')")
    code, found = planned(shop)
    assert (code, found["code"], found["outcome"], found["digest"]) == (0, "3", "violated", "")
    assert "**This plan is blocked:**" in (shop.root / "out/comment.md").read_text()
    assert not (shop.root / "out/change.plan").exists()


def test_what_is_no_plan_ends_the_job(shop: Governed) -> None:
    (shop.directory / "all.yaml").write_text("gates: [")
    assert planned(shop) == (1, {})
    assert planned(shop, STATE="nowhere")[0] == 1
    assert not (shop.root / "out/change.plan").exists()


def test_from_a_snapshot_no_database_is_asked(shop: Governed) -> None:
    shop.settle()
    snapshot = shop.root / "live.snapshot"
    assert governed.command("snapshot", "-s", shop.directory, "--out", snapshot, dsn=shop.db.dsn).returncode == 0
    shop.state["gates"]["shop.limit"]["value"] = "12"
    shop.write()
    code, found = planned(shop, LIVE=str(snapshot), RECONCILER_DSN="host=nowhere.example.org")
    assert (code, found["outcome"]) == (0, "changes")
    assert found["digest"] == shop.plan().effect_digest
    assert "Planned from a snapshot of " in (shop.root / "out/comment.md").read_text()


# ----------------------------------------------------------------------------------------------------------- comment.sh


def test_one_comment_is_made_and_then_written_anew(api: Api, tmp_path: Path) -> None:
    api.add("reviewer", "Looks good.")
    first = commented(api, tmp_path, f"{MARKER}\n# One\n")
    assert (first.returncode, first.stdout) == (0, "Comment: https://example.org/shop/db/pull/7#2\n")
    second = commented(api, tmp_path, f'{MARKER}\n# Two "quoted" $HOME `id` \\n é\n')
    assert second.returncode == 0, second.stdout
    assert [one["body"] for one in api.comments] == ["Looks good.", f'{MARKER}\n# Two "quoted" $HOME `id` \\n é\n']
    assert [method for method, _ in api.asked] == ["GET", "POST", "GET", "PATCH"]
    assert api.tokens == {f"Bearer {TOKEN}"}


def test_it_is_found_among_hundreds(api: Api, tmp_path: Path) -> None:
    for _ in range(100):
        api.add("reviewer", "Another thought.")
    api.add(BOT, "<!-- reconciler plan ffffffffffffffffffffffffffffffff -->\nanother target\r\n")
    api.add(BOT, f"{MARKER}\r\nolder\r\n")
    assert commented(api, tmp_path, f"{MARKER}\nnewer\n").returncode == 0
    assert len(api.comments) == 102
    assert api.comments[101]["body"] == f"{MARKER}\nnewer\n"
    assert api.comments[100]["body"].endswith("another target\r\n")


def test_a_comment_of_somebody_else_with_our_marker_is_not_ours(api: Api, tmp_path: Path) -> None:
    """Who wrote a comment can change it: the plan must not stand in a stranger's."""
    api.add("stranger", f"{MARKER}\nPlan: nothing to see here.")
    api.add(BOT, f"A quotation.\n{MARKER}\n")
    assert commented(api, tmp_path, f"{MARKER}\nours\n").returncode == 0
    assert [one["user"]["login"] for one in api.comments] == ["stranger", BOT, BOT]
    assert api.comments[0]["body"].endswith("nothing to see here.")
    assert api.comments[2]["body"] == f"{MARKER}\nours\n"


@pytest.mark.parametrize("code", [401, 403, 404])
def test_without_permission_it_says_so_and_the_job_goes_on(api: Api, tmp_path: Path, code: int) -> None:
    api.refuse = code, "Resource not accessible by integration"
    done = commented(api, tmp_path, f"{MARKER}\n# One\n")
    assert (done.returncode, api.comments) == (0, [])
    assert done.stdout.startswith("::warning title=No comment::Writing the comment: the token may not")


def test_what_is_too_long_or_refused_is_an_error(api: Api, tmp_path: Path) -> None:
    done = commented(api, tmp_path, f"{MARKER}\n{'é' * 65536}")
    assert (done.returncode, api.asked) == (1, [])
    assert "a comment at most 65536" in done.stdout
    longest = f"{MARKER}\n{'é' * (65535 - len(MARKER))}"
    assert commented(api, tmp_path, longest).returncode == 0
    assert api.comments[0]["body"] == longest
    api.refuse = 422, "Validation Failed: body is too long"
    done = commented(api, tmp_path, f"{MARKER}\nagain\n")
    assert done.returncode == 1
    assert "GitHub did not take it: Validation Failed: body is too long" in done.stdout
    api.refuse = 500, "Oops"
    assert "GitHub answered 500. Run the job again." in commented(api, tmp_path, f"{MARKER}\nagain\n").stdout


@pytest.mark.parametrize("body", ["# No marker\n", "", "<!-- another -->\nx"])
def test_what_is_no_plan_is_not_posted(api: Api, tmp_path: Path, body: str) -> None:
    done = commented(api, tmp_path, body)
    assert (done.returncode, api.asked) == (1, [])
    assert "does not begin with the marker of a plan" in done.stdout


# ------------------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("name", ["plan.sh", "comment.sh"])
def test_shellcheck_finds_nothing(name: str) -> None:
    assert tools.shellcheck((PROJECT / "action" / name).read_text(), "bash") == ""


def test_the_action_uses_what_it_declares() -> None:
    text = ACTION.read_text()
    document = YAML(typ="safe", pure=True).load(text)
    used = set(re.findall(r"inputs\.([a-z-]+)", text))
    assert used == set(document["inputs"])
    assert set(re.findall(r"outputs\.([a-z-]+)", text)) - {"code"} == set(document["outputs"])
    for step in document["runs"]["steps"]:
        # No input reaches a shell as part of a script: what it holds would be run.
        assert "${{" not in step.get("run", "")
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step
        else:
            assert step["shell"] == "bash"
