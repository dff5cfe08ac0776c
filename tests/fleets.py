"""Made-up fleets for tests: one governed system in many databases of the test server, and the file that lists them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from reconciler import plan as planning
from reconciler.fleet import groups
from tests.integration.governed import command, shop

if TYPE_CHECKING:
    from pathlib import Path

    from reconciler.fleet.groups import Group
    from tests.servers import Database


class Shops:
    """So many copies of the shop, `shop-001` ...; every third is in `us`, the others in `eu`."""

    def __init__(self, db: Database, root: Path, number: int, *, approval: dict[str, Any] | None = None) -> None:
        self.root = root
        self.template = shop(db, root)
        if approval is not None:
            self.template.state["governance"]["approval"] = approval
        self.template.write()
        self.server = db.server
        self.databases = {f"shop-{index:03}": f"{db.name}_{index}" for index in range(1, number + 1)}
        db.conn.close()
        with self._admin() as conn:
            for name in self.databases.values():
                query = sql.SQL("CREATE DATABASE {} TEMPLATE {}" + " STRATEGY FILE_COPY" * (db.server.major >= 15))
                conn.execute(query.format(sql.Identifier(name), sql.Identifier(db.name)))
        self.file = root / "fleet.yaml"
        self.declared: dict[str, Any] = {
            "version": 1,
            "name": "shops",
            "state": "state",
            "target": "test",
            "targets": [
                {
                    "name": name,
                    "dsn": self.dsn(name),
                    "labels": {"region": "us" if index % 3 == 0 else "eu"},
                }
                for index, name in enumerate(self.databases, 1)
            ],
            "workers": 2,
        }
        self.write()

    @property
    def names(self) -> list[str]:
        return list(self.databases)

    def write(self) -> None:
        self.file.write_text(json.dumps({"fleet": self.declared}, indent=1))

    def dsn(self, name: str) -> str:
        return self.server.dsn(self.databases[name])

    def sql(self, name: str, *statements: str) -> list[tuple[Any, ...]]:
        """Statements by hand on one target, roles filled in; the rows of the last."""
        rows: list[tuple[Any, ...]] = []
        with psycopg.connect(self.dsn(name), autocommit=True) as conn:
            for statement in statements:
                filled = statement
                for word, role in self.template.names.items():
                    filled = filled.replace(f"{{{word}}}", role)
                cursor = conn.execute(filled.encode())
                rows = cursor.fetchall() if cursor.description else []
        return rows

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """`reconciler fleet ...` in this process."""
        return command("fleet", *words, cwd=self.root)

    def told(self, *words: str | Path) -> dict[str, Any]:
        """The report of a command, as JSON."""
        done = self.run(*words, "--format", "json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def plan(self, folder: str = "plans", *more: str) -> list[Path]:
        """The files of the groups, the largest first."""
        done = self.run("plan", self.file, "--out", self.root / folder, *more)
        assert done.returncode == 0, done.stderr + done.stdout
        found = (self.root / folder).glob("*.fleet.plan")
        return sorted(found, key=lambda path: (-len(groups.load(path)[0].targets), path.name))

    def group(self, path: Path) -> Group:
        return groups.load(path)[0]

    def approve(self, path: Path, *more: str | Path, by: str = "operator") -> Path:
        """Everything accepted."""
        group = self.group(path)
        accept = [word for hazard in group.plan.hazards for word in ("--accept", hazard)]
        done = command("approve", path, "--as", by, "--reason", "a test", *accept, *more)
        assert done.returncode == 0, done.stderr
        return path.with_name(f"{path.name}.{by}.approval.json")

    def apply(self, *words: str | Path, evidence: str = "evidence") -> subprocess.CompletedProcess[str]:
        return self.run("apply", *words, "-f", self.file, "--initialize", "--evidence", self.root / evidence)

    def rollout(self, evidence: str = "evidence") -> dict[str, str]:
        """What the last apply with this evidence did with each target."""
        report = json.loads((self.root / evidence / "rollout.json").read_text())
        return {one["name"]: one["state"] for one in report["targets"]}

    def entries(self, name: str) -> int:
        if self.sql(name, "SELECT to_regclass('reconciler.entry')")[0][0] is None:
            return 0
        return self.sql(name, "SELECT count(*) FROM reconciler.entry")[0][0]

    def nothing_left(self) -> bool:
        """Is the plan of every target empty?"""
        report = self.told("plan", self.file)
        return {one["outcome"] for one in report["targets"]} == {"no_changes"}

    def drop(self) -> None:
        with self._admin() as conn:
            for name in self.databases.values():
                conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _admin(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.server.dsn(), autocommit=True)


class Workers:
    """Worker processes, ended with the test."""

    def __init__(self, shops: Shops, dsn: str) -> None:
        self.shops, self.dsn = shops, dsn
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        words = ["fleet", "worker", "--queue", self.dsn, str(self.shops.file), "--heartbeat", "1s", *more]
        log = (self.shops.root / f"worker-{len(self.running)}.log").open("wb")
        code = "from reconciler.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=log, stderr=subprocess.STDOUT, cwd=self.shops.root
        )
        log.close()
        self.running.append(process)
        return process

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.shops.root.glob("worker-*.log")))

    def end(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """A document of ours with other values, and a checksum that fits: what an attacker would write."""
    document = planning.read(path, "file")
    planning.write(path, {**document, **change})
