"""A fleet on several machines: rounds, workers that are killed, the schedule; by procrastinate on a real server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql

from reconciler.fleet import queue
from tests.fleets import Shops, Workers
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def shops(db: Database, tmp_path: Path) -> Iterator[Shops]:
    made = Shops(db, tmp_path, 3)
    yield made
    made.drop()


@pytest.fixture
def results(db: Database) -> Iterator[str]:
    """The database of the queue."""
    name = f"{db.name}_results"
    with psycopg.connect(db.server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    queue.create(db.server.dsn(name))
    yield db.server.dsn(name)
    Database(db.server, name).drop()


@pytest.fixture
def workers(shops: Shops, results: str) -> Iterator[Workers]:
    made = Workers(shops, results)
    yield made
    made.end()


def test_a_round_by_one_worker(shops: Shops, workers: Workers) -> None:
    workers.start()
    told = shops.told("drift", shops.file, "--queue", workers.dsn)
    assert [one["name"] for one in told["targets"]] == shops.names
    assert {one["outcome"] for one in told["targets"]} == {"no_changes"}, workers.logs()
    assert told["finished_at"] is not None
    again = shops.told("status", "--queue", workers.dsn)
    assert again["round"] == told["round"]
    workers.end()
    assert [process.returncode for process in workers.running] == [0], workers.logs()
