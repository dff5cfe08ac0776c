"""examples/fleet: its README walks through a rollout that stops and goes on, drift of all, and a queue."""

from __future__ import annotations

import re
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql

from tests.integration.test_example_feature_flags import shell
from tests.servers import PROJECT, Server

EXAMPLE = PROJECT / "examples" / "fleet"
DATABASES = ("shop_eu_1", "shop_eu_2", "shop_us_1", "fleet_rounds")


@pytest.mark.slow
def test_the_readme_walks_through_it(server: Server) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    # The first block starts a sandbox; here it is the server of the run.
    assert blocks[0].startswith("RECONCILER_DSN=$(reconciler sandbox up ")
    # In the form in which a sandbox says it: a URI with the socket behind the name of the database.
    uri = f"postgresql://postgres@:{server.port}/postgres?host={quote(server.host)}"
    try:
        done = shell("\n".join(blocks[1:]), RECONCILER_DSN=uri)
    finally:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            for name in DATABASES:
                conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
    assert done.returncode == 0, done.stdout + done.stderr
    told = [
        re.sub(r"\d+\.\d s", "0.0 s", line) for line in done.stdout.splitlines() if line.startswith(("Fleet", "exit"))
    ]
    assert told == [
        "Fleet shops, plan: 3 targets: 3 changes; 0.0 s, 4 workers.",
        "Fleet shops, apply: 3 targets: 2 applied, 1 failed; 0.0 s, 4 workers.",
        "exit code 4",
        "Fleet shops, apply: 3 targets: 2 skipped, already applied, 1 applied; 0.0 s, 4 workers.",
        "Fleet shops, plan: 3 targets: 3 no changes; 0.0 s, 4 workers.",
        "Fleet shops, drift: 3 targets: 2 no changes, 1 drift; 0.0 s, 4 workers.",
        "exit code 2",
        "Fleet shops, drift: 3 targets: 2 no changes, 1 drift; 0.0 s, 1 worker.",
        "exit code 2",
        "Fleet shops, drift: 3 targets: 2 no changes, 1 drift; 0.0 s, 1 worker.",
        "exit code 2",
    ]
    assert "For 3 targets of fleet shops, each as planned for the first:" in done.stdout
    assert "~ shop-eu-2  drift: " in done.stdout
