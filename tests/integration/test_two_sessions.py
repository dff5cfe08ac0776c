"""Proofs with a second session, on a small system: who waits for whom, what is done meanwhile, and what is left."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import desired, pg
from reconciler.checks.proof import rehearse
from reconciler.errors import ServerProblem
from reconciler.model import Asked

if TYPE_CHECKING:
    from pathlib import Path

    from reconciler.model import Verdict
    from tests.servers import Database

pytestmark = pytest.mark.smoke

SMALL = """
CREATE TABLE public.settings (name text PRIMARY KEY, value text);
INSERT INTO public.settings VALUES ('app.open', 'false');
CREATE TABLE public.seat (id integer PRIMARY KEY, taken_by text);
INSERT INTO public.seat VALUES (1), (2), (3);
CREATE TABLE public.note (at integer PRIMARY KEY, said text);
CREATE FUNCTION public.take(seat integer, who text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE holder text;
BEGIN
    SELECT s.taken_by INTO holder FROM public.seat AS s WHERE s.id = seat FOR UPDATE;
    IF holder IS NOT NULL THEN RETURN holder; END IF;
    UPDATE public.seat AS s SET taken_by = who WHERE s.id = seat;
    RETURN who;
END $$;
CREATE FUNCTION public.take_blindly(seat integer, who text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE holder text;
BEGIN
    SELECT s.taken_by INTO holder FROM public.seat AS s WHERE s.id = seat;
    IF holder IS NOT NULL THEN RETURN holder; END IF;
    UPDATE public.seat AS s SET taken_by = who WHERE s.id = seat;
    RETURN who;
END $$;
CREATE FUNCTION public.note_once(at_ integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.note VALUES (at_, 'new') ON CONFLICT DO NOTHING;
    IF FOUND THEN RETURN 'new'; END IF;
    RETURN coalesce((SELECT 'known' FROM public.note WHERE at = at_), 'gone');
END $$;
"""
GOVERNANCE = {
    "version": 1,
    "name": "small",
    "release": "first",
    "targets": {"main": {}},
    "gate_stores": {"settings": {"table": "public.settings", "key": "name", "value": "value"}},
    "approval": {"signed": False},
    "apply": {"statement_timeout": "5s"},
}


class Pair:
    """A small system and two sessions on it; `play` plays one proof."""

    def __init__(self, db: Database, folder: Path) -> None:
        self.db = db
        self.folder = folder
        db.execute(SMALL)

    def play(self, *steps: dict[str, Any]) -> Verdict:
        proof = {"reason": "A test.", "sessions": 2, "steps": list(steps)}
        gate = {"app.open": {"value": "false", "reason": "A test."}}
        whole = {"governance": GOVERNANCE, "gates": gate, "proofs": {"one": proof}}
        (self.folder / "all.yaml").write_text(json.dumps(whole))
        wanted = desired.load(self.folder, None)
        with pg.connect(self.db.dsn, "prove") as conn, pg.connect(self.db.dsn, "prove") as other:
            return rehearse(conn, other, wanted.checks["proof.one"], Asked(wanted, (), inside=True))

    def seats(self) -> list[Any]:
        return self.db.execute("SELECT taken_by FROM public.seat ORDER BY id")


@pytest.fixture
def pair(db: Database, tmp_path: Path) -> Pair:
    return Pair(db, tmp_path)


def taking(seat: int, *, answer: str, **more: Any) -> dict[str, Any]:
    """A step in which `us` takes a seat that `them` has taken and not committed."""
    return {
        "holder": [f"UPDATE public.seat SET taken_by = 'them' WHERE id = {seat}"],
        "when": f"SELECT public.take({seat}, 'us') AS who",
        "then": [{"returns": {"who": answer}}],
        **more,
    }


def test_what_the_holder_decided_is_seen_and_only_that_stays(pair: Pair) -> None:
    verdict = pair.play(
        taking(1, answer="them", release="commit"),
        taking(2, answer="us", release="rollback"),
        {"holder": ["SELECT 1"], "when": "SELECT public.take(3, 'us') AS who", "then": [{"returns": {"who": "us"}}]},
    )
    assert (verdict.status, verdict.detail) == ("rehearsed", "3 steps, 3 expectations met")
    assert pair.seats() == [("them",), (None,), (None,)]


def test_each_step_goes_on_where_the_given_of_the_one_before_ended(pair: Pair) -> None:
    seen = {"holder": ["SELECT 1"], "when": "SELECT count(*) AS n FROM public.note"}
    verdict = pair.play(
        {**seen, "given": ["INSERT INTO public.note VALUES (1, 'a')"], "then": [{"returns": {"n": 1}}]},
        {**seen, "when": "INSERT INTO public.note VALUES (2, 'b')", "then": [{"returns": []}]},
        {**seen, "arm": {"app.open": "true"}, "then": [{"returns": {"n": 1}}]},
        {**seen, "when": "SELECT value FROM public.settings", "then": [{"returns": {"value": "true"}}]},
    )
    assert verdict.status == "rehearsed", verdict.detail
    # Armed gates are put back, rows that were given are not.
    assert pair.db.execute("SELECT value FROM public.settings") == [("false",)]
    assert pair.db.execute("SELECT at FROM public.note") == [(1,)]


def test_who_does_not_wait_fails(pair: Pair) -> None:
    one = taking(1, answer="us", release="commit", holder=["SELECT 1"])
    verdict = pair.play({**taking(2, answer="us", release="rollback")}, one)
    assert (verdict.status, verdict.detail) == ("failed", "step 2: the statement did not wait for the holder")


def test_without_release_waiting_is_a_time_out(pair: Pair) -> None:
    verdict = pair.play(taking(1, answer="us", within="300ms"))
    assert verdict.status == "failed"
    assert verdict.detail.startswith("when: canceling statement due to statement timeout")
    assert pair.seats() == [(None,)] * 3


LOCKED = {
    "holder": ["SELECT s.id FROM public.seat AS s WHERE s.id = 1 FOR UPDATE"],
    "meanwhile": ["UPDATE public.seat SET taken_by = 'them' WHERE id = 1"],
    "release": "commit",
    "then": [{"returns": {"who": "them"}}],
}


def test_meanwhile_tells_a_look_under_a_lock_from_one_without(pair: Pair) -> None:
    """Both wait, one for the lock and one with its UPDATE; only the first looks at what was decided meanwhile."""
    assert pair.play({**LOCKED, "when": "SELECT public.take(1, 'us') AS who"}).status == "rehearsed"
    pair.db.execute("UPDATE public.seat SET taken_by = NULL")
    verdict = pair.play({**LOCKED, "when": "SELECT public.take_blindly(1, 'us') AS who"})
    assert (verdict.status, verdict.detail) == ("failed", 'then 1: who: found "us", expected "them"')


def test_what_goes_wrong_meanwhile_is_said_and_nobody_waits_for_ever(pair: Pair) -> None:
    broken = {**LOCKED, "meanwhile": ["INSERT INTO public.seat VALUES (1)"]}
    verdict = pair.play({**broken, "when": "SELECT public.take(1, 'us') AS who"})
    assert verdict.status == "failed"
    assert verdict.detail.startswith("meanwhile 1: duplicate key value violates unique constraint")
    assert pair.seats() == [(None,)] * 3


def gone(**more: Any) -> dict[str, Any]:
    return {
        "given": ["INSERT INTO public.note VALUES (1, 'old')"],
        "pause": {"after": "insert", "on": "public.note"},
        "meanwhile": ["DELETE FROM public.note WHERE at = 1"],
        "release": "commit",
        "when": "SELECT public.note_once(1) AS answer",
        "then": [{"returns": {"answer": "gone"}}],
        **more,
    }


LEFT = "SELECT tgname::text FROM pg_trigger WHERE tgname = 'reconciler_pause' UNION ALL SELECT proname FROM pg_proc"
LEFT += " WHERE proname = 'reconciler_pause'"


def test_a_pause_between_two_statements_of_a_function(pair: Pair) -> None:
    assert pair.play(gone()).status == "rehearsed"
    assert pair.db.execute(LEFT) == []
    kept = pair.play(gone(release="rollback", then=[{"returns": {"answer": "known"}}]))
    assert kept.status == "rehearsed", kept.detail
    assert pair.db.execute(LEFT) == []


def test_a_pause_before_a_statement(pair: Pair) -> None:
    """The statement has its snapshot by then, so it does not see what is decided in the pause, except by its lock."""
    step = {
        "pause": {"before": "update", "on": "public.seat"},
        "meanwhile": ["UPDATE public.seat SET taken_by = 'them' WHERE id = 1"],
        "release": "commit",
        "when": "UPDATE public.seat SET taken_by = 'us' WHERE id = 1 AND taken_by IS NULL RETURNING id",
        "then": [{"returns": []}],
    }
    assert pair.play(step).status == "rehearsed"


def test_a_failing_proof_leaves_no_pause_behind(pair: Pair) -> None:
    verdict = pair.play(gone(then=[{"returns": {"answer": "known"}}]))
    assert (verdict.status, verdict.detail) == ("failed", 'then 1: answer: found "gone", expected "known"')
    assert pair.db.execute(LEFT) == []
    # Nor does one that never comes to the pause.
    verdict = pair.play(gone(pause={"after": "delete", "on": "public.note"}))
    assert (verdict.status, verdict.detail) == ("failed", 'then 1: answer: found "known", expected "gone"')
    assert pair.db.execute(LEFT) == []


def test_a_pause_on_a_table_that_is_not_there(pair: Pair) -> None:
    with pytest.raises(ServerProblem, match=r"making the pause on public\.nothing: .*does not exist"):
        pair.play(gone(pause={"after": "insert", "on": "public.nothing"}))
    assert pair.db.execute(LEFT) == []
