"""Beside the tests: inputs for the routines of Điều 45, generated: states of their tables, and calls made on them.

A state holds values at the edges and odd ones: gates in every spelling or absent, jobs in every state, with leases that
ran out, run on or are missing, equal times and keys, attempts up to the end of their type, a hundred stale leases. Most
calls are such that they come through; each refusal and each error has its share.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from psycopg import sql

from reconciler.sql import split_identity
from tests.integration.phase2 import CALLER, DRY_RUN_ONLY, HEARTBEAT, REAPER, REPLAY, SUBSTRATE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

INPUTS = 1000
"""How many inputs a mutant must survive before it is called equivalent."""

CALLS = 5
"""How many calls are made on one state."""

CHUNK = 20
"""Scenes that are played at once, with the same ways of the planner; before each chunk the tables are made anew."""

RIVALS = 0.12
"""The share of scenes with a rival."""

TABLES = ("dot_config", "job_queue", "job_dead_letter", "queue_heartbeat")
"""What the routines read and write; the inputs fill these. Afterwards every table of the schema is compared."""

# ------------------------------------------------------------------------------------------------------------ an input


class Call(NamedTuple):
    """One statement that calls the routine, and the role that sends it."""

    role: str
    statement: str


@dataclass(frozen=True)
class Scene:
    """A state of the tables, and calls that are each made on just this state.

    clock: the first reading of the clock in a call. tick: how far it goes on between two readings. began: what now()
    says, some time before. indexes: may the planner use indexes and nested loops? rival: does another session end all
    active jobs right after a call's INSERT into job_queue? tables: complete rows.
    """

    number: int
    clock: str
    tick: str
    began: str
    indexes: bool
    rival: bool
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    calls: tuple[Call, ...]

    def asked(self, *, whole: bool) -> str:
        """What the server is sent; `whole`: it returns rows and not only their digest."""
        calls = [call._asdict() for call in self.calls]
        around = {"clock": self.clock, "tick": self.tick, "began": self.began, "rival": self.rival}
        return json.dumps({"whole": whole, "indexes": self.indexes, "calls": calls, **around, **self.tables})

    def short(self, call: Call) -> str:
        """The input in one line: the call, the clock, the gates, and the rows that the call names."""
        gates = {row["key"]: row["value"] for row in self.tables["dot_config"] if row["key"] not in _DULL}
        rows = [
            {name: value for name, value in row.items() if value is not None and name not in _DULL}
            for table in TABLES[1:]
            for row in self.tables[table]
            if any(str(value) in call.statement for name, value in row.items() if name in _NAMES)
        ]
        held = ", ".join(f"{len(self.tables[table])} {table}" for table in TABLES[1:])
        around = f"at {self.clock}, began {self.began}, tick {self.tick}"
        around += "" if self.indexes else ", without indexes and nested loops"
        around += ", with a rival" if self.rival else ""
        return f"{call.statement} {around}; gates {gates}; {held}; {json.dumps(rows, ensure_ascii=False)}"


_NAMES = ("job_id", "dead_letter_id", "executor_name")
_DULL = frozenset(
    """
    created_at updated_at payload_json metadata source_ref target_ref payload_ref
    queue.notify.enabled queue.worker.enabled queue.runtime.phase
    """.split()
)
"""Gates and columns that no routine decides by."""


@cache
def scenes(routine: str, inputs: int = INPUTS, *, ties: bool = True) -> tuple[Scene, ...]:
    """Scenes with so many different inputs for a routine, the same ones each time.

    ties: may a time equal the clock, or the clock less a threshold in whole seconds, to the microsecond?
    """
    _, name, _ = split_identity(routine)
    rng = random.Random(name)
    found: list[Scene] = []
    left = inputs
    while left:
        world = _World(rng, _MIXES.get(name, _Mix()), len(found), ties)
        calls: dict[Call, None] = {}
        for _ in range(4 * CALLS):
            if len(calls) < CALLS:
                calls[world.call(name)] = None
        found.append(world.scene(tuple(calls)[: min(CALLS, left)], rival=rng.random() < RIVALS))
        left -= len(found[-1].calls)
    return tuple(found)


# ------------------------------------------------------------------------------------------------ where they come from

STATES = (
    "queued", "leased", "in_progress", "retry_waiting", "succeeded", "failed", "dead_letter", "cancelled", "cleaned"
)  # fmt: skip
ACTIVE = frozenset(STATES[:4])
KINDS = ("DOT", "Agent", "Hermes", "Codex", "PG_worker", "external_worker", "future_Kestra_adapter")
TRIAGE = ("pending", "acknowledged", "manual_replay", "escalated", "closed")
REASONS = ("max_attempts", "non_retryable", "lease_expired_max_attempts")

OPEN = ("true", "true", "true", "TRUE", "True", " true", "true ", "  tRuE  ")
SHUT = ("false", "", " ", "garbage", "on", "y", "yes", "t", "1", "truex", "xtrue", "true\n", "\ttrue", "truе")  # noqa: RUF001
LIFTED = ("false",)
KEPT = ("true", "TRUE", "FALSE", " false", "false ", "falsex", "", "garbage", "off", "n", "f", "0")
"""Spellings that open a gate, that leave it shut, that lift `dry_run_only`, and that do not."""

NUMBERS = ("1", "2", "7", "10", "60", "300", "301", "3599", "3600", "3601", "999999999")
ODD_NUMBERS = (" 7", "9 ", "  60  ", "0", "-5", "abc", "", "7.5", "007", "7x", "1e3", "1000000000", "٣", "60\n", "x60")
"""Numbers as they may stand in the configuration, read as the default for the most part."""

SECONDS = (0, 0, 1, 2, 9, 10, 11, 59, 60, 61, 299, 300, 301, 3599, 3600, 3601, 86_400, 1_300_000_000)
"""How far a time may be from the clock."""

ATTEMPTS = (
    *[(0, 5), (0, 5), (1, 5), (2, 5), (3, 5), (3, 5), (4, 5), (4, 5), (5, 5), (7, 5), (0, 1), (0, 2), (1, 2)],
    *[(5, 12), (8, 12), (9, 12), (10, 12), (11, 13), (12, 14), (18, 40), (19, 40), (20, 40), (21, 40), (22, 40)],
    *[(1023, 5000), (1024, 5000), (1025, 5000), (2_147_483_645, 2_147_483_647), (2_147_483_647, 5)],
)
"""attempts and max_attempts. From 1,025 attempts on a power of two is beyond double precision."""

OWNERS = ("w1", "w2", "W1", "w1 ", "", " ", "wörker")
JOB_KINDS = ("mail.send", "mail.read", "Mail.send", " ")
PEOPLE = ("operator", "tester", " t ", "ü")
REFERENCES = (None, None, "ref:1", "ref:2", "")
TEXTS = (None, "", "boom", "boom ' \\ % $1 ü", "x" * 300)
PAYLOADS = (
    "{}", "{}", '{"ref": 1}', '{"ref": {"bodyx": 1, "ids": [1, {"a": null}]}}', '{"bodies": ["body", "secret"]}',
    '{"tokens": "token"}', '{"": 1}'
)  # fmt: skip
DENIED = (
    '{"%s": 1}', '{"%s": 1, "ref": 2}', '{"a": {"%s": [1]}}', '{"a": [[{" %s ": 1}]]}', '{"b": {"%s": 1}, "%s": 2}',
    '{"%s": {"%s": {"ssn": 3}}, "token": 4}'
)  # fmt: skip
DENIED_NAMES = (
    "body", "content", "raw", "vector", "embedding", "secret", "token", "password", "ssn", "personal_data"
)  # fmt: skip
NO_OBJECTS = ("[]", "1", '"body"', "null", '[{"body": 1}]', "true", None)
METADATA = ('{"host": "a"}', '{"host": "b", "v": 2}', '{"marker": "mine"}', "{}", "[]", "[1]", "1", "null", '"x"', None)
HELD_METADATA = ({}, {"host": "z"}, {"marker": "legacy_silent_passive", "v": 1}, {"host": "a"}, ["list"])


@dataclass(frozen=True)
class _Mix:
    """What the states for a routine hold mostly, so that most of its calls come through.

    jobs: states that most jobs have. future: the share of leases that still run. sure: how many jobs are leased at
    least. many: are there states with a hundred stale leases?
    """

    jobs: tuple[str, ...] = STATES
    future: float = 0.5
    sure: int = 0
    many: bool = False


_LEASED = ("leased", "in_progress")
_MIXES = {
    "fn_job_claim": _Mix(jobs=("queued", "retry_waiting")),
    "fn_job_ack": _Mix(jobs=_LEASED, sure=2),
    "fn_job_fail": _Mix(jobs=_LEASED, sure=2),
    "fn_job_extend_lease": _Mix(jobs=_LEASED, sure=3, future=0.93),
    "fn_job_reap_stale_leases_dry_run": _Mix(jobs=_LEASED, future=0.2, many=True),
    "fn_job_reap_stale_leases_apply": _Mix(jobs=_LEASED, future=0.2, many=True),
    "fn_job_queue_updated_at": _Mix(sure=1),
}


@dataclass
class _World:
    """One state in the making."""

    rng: random.Random
    mix: _Mix
    number: int
    ties: bool
    clock: datetime = field(init=False)
    past: list[str] = field(init=False)
    future: list[str] = field(init=False)
    jobs: list[dict[str, Any]] = field(init=False)
    letters: list[dict[str, Any]] = field(init=False)
    executors: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        rng = self.rng
        self.clock = datetime(2026, 5, 26, 4, 0, tzinfo=UTC) + timedelta(
            days=rng.randrange(-400, 400), microseconds=rng.choice((0, 1, 499_999, 500_000, rng.randrange(10**11)))
        )
        # Few different moments, so that many rows have the same one.
        self.past = [self._moment(-1) for _ in range(rng.choice((1, 3, 5)))]
        self.future = [self._moment(1) for _ in range(rng.choice((1, 3)))]
        if rng.random() < 0.04:
            self.past.append("-infinity")
            self.future.append("infinity")
        self.jobs = self._jobs()
        self.letters = self._letters()
        names = rng.sample(("w1", "w2", "W1", " w1", "wörker", "hermes"), rng.choice((0, 1, 2, 4, 6)))
        self.executors = [self._executor(name) for name in names]

    def _moment(self, sign: int) -> str:
        """A time in the past or future. A whole number of seconds from the clock is a tie with some threshold."""
        beside = (0, 0, 1, -1, 500_000) if self.ties else (1, -1, 250_001, 500_001, 999_999)
        distance = timedelta(seconds=self.rng.choice(SECONDS), microseconds=self.rng.choice(beside))
        return (self.clock + sign * distance).isoformat()

    def any_time(self, future: float = 0.5) -> str:
        return self.rng.choice(self.future if self.rng.random() < future else self.past)

    def uuid(self) -> str:
        return str(UUID(int=self.rng.getrandbits(128), version=4))

    def often(self, share: float = 0.95) -> bool:
        return self.rng.random() < share

    # The tables

    def _gates(self) -> list[dict[str, Any]]:
        values: dict[str, str | None] = {
            key: self.rng.choice(OPEN) if self.often() else self.rng.choice((*SHUT, None))
            for key in (SUBSTRATE, HEARTBEAT, REAPER)
        }
        values[DRY_RUN_ONLY] = self.rng.choice(LIFTED if self.often() else (*KEPT, None))
        values[REPLAY] = self.rng.choice(OPEN if self.often(0.6) else (*SHUT, None))
        for key in ("lease.duration_sec", "heartbeat.stale_threshold_seconds", "retry.backoff_base_sec"):
            values[f"queue.{key}"] = self.rng.choice(NUMBERS if self.often(0.5) else (*ODD_NUMBERS, None))
        values["queue.retry.max_attempts_default"] = self.rng.choice(
            NUMBERS if self.often(0.5) else (*ODD_NUMBERS, None)
        )
        values |= {"queue.notify.enabled": "false", "queue.worker.enabled": "false"}
        values["queue.runtime.phase"] = "phase2_governance"
        rows = [
            {"key": key, "value": value, "description": None, "updated_at": "2026-05-25T20:14:07.318402+00:00"}
            for key, value in values.items()
            if value is not None
        ]
        self.rng.shuffle(rows)
        return rows

    def _jobs(self) -> list[dict[str, Any]]:
        rng, mix = self.rng, self.mix
        states = [rng.choice(mix.jobs if self.often(0.75) else STATES) for _ in range(rng.choice((0, 1, 2, 3, 5, 8)))]
        states += [rng.choice(_LEASED) for _ in range(mix.sure)]
        taken: set[str] = set()
        jobs = [self._job(state, taken) for state in states]
        if mix.many and self.number % 10 == 7:
            many = [self._job(rng.choice(_LEASED), taken) for _ in range(rng.choice((96, 99, 100, 101, 102, 120)))]
            jobs += [job | {"lease_owner": "w1", "lease_until": rng.choice(self.past)} for job in many]
        return jobs

    def _job(self, state: str, taken: set[str]) -> dict[str, Any]:
        rng = self.rng
        key = f"key {rng.randrange(6)}"
        if state in ACTIVE:
            while key in taken:
                key += "+"
            taken.add(key)
        # Nothing but the functions keeps a leased job from having no lease, or another one from having one.
        leased = self.often(0.97 if state in _LEASED else 0.1)
        attempts, max_attempts = rng.choice(ATTEMPTS[:13] if self.often(0.7) else ATTEMPTS)
        ended = state not in ACTIVE
        return {
            "job_id": self.uuid(),
            "job_kind": rng.choice(JOB_KINDS[:3]),
            "state": state,
            "source_ref": rng.choice(REFERENCES),
            "target_ref": rng.choice(REFERENCES),
            "payload_ref": rng.choice(REFERENCES),
            "payload_json": json.loads(rng.choice(PAYLOADS)),
            "priority": rng.choice((0, 1, 100, 100, 2_147_483_647)),
            "scheduled_at": self.any_time(0.2),
            "picked_at": self.any_time(0) if leased else None,
            "finished_at": self.any_time(0.1) if ended or not self.often() else None,
            "lease_owner": rng.choice(OWNERS[:2] if self.often(0.8) else OWNERS) if leased else None,
            "lease_until": self.any_time(self.mix.future) if leased else None,
            "attempts": attempts,
            "max_attempts": max_attempts,
            "idempotency_key": key,
            "actor": rng.choice(PEOPLE),
            "run_id": rng.choice((None, self.uuid())),
            "last_error": rng.choice(TEXTS),
            "created_at": self.any_time(0),
            "updated_at": self.any_time(0),
        }

    def _letters(self) -> list[dict[str, Any]]:
        rng = self.rng
        # A letter may be there already for any job, and one outlives its job.
        jobs = [job["job_id"] for job in self.jobs if not self.often(0.7)]
        return [self._letter(job) for job in (*jobs, *(self.uuid() for _ in range(rng.choice((1, 3, 6)))))]

    def _letter(self, job_id: str) -> dict[str, Any]:
        rng = self.rng
        attempts, max_attempts = rng.choice(ATTEMPTS)
        triaged = not self.often(0.5)
        return {
            "dead_letter_id": self.uuid(),
            "job_id": job_id,
            "job_kind": rng.choice(JOB_KINDS),
            "idempotency_key": f"key {rng.randrange(6)}",
            "source_ref": rng.choice(REFERENCES),
            "target_ref": rng.choice(REFERENCES),
            "payload_ref": rng.choice(REFERENCES),
            "payload_json": json.loads(rng.choice(PAYLOADS)),
            "priority": rng.choice((0, 100)),
            "actor": rng.choice(PEOPLE),
            "run_id": rng.choice((None, self.uuid())),
            "attempts": attempts,
            "max_attempts": max_attempts,
            "last_error": rng.choice(TEXTS),
            "last_lease_owner": rng.choice((None, *OWNERS)),
            "dead_letter_reason": rng.choice(REASONS),
            "dead_lettered_by": rng.choice(OWNERS),
            "dead_lettered_at": self.any_time(0),
            "triage_status": rng.choice(TRIAGE),
            "triaged_at": self.any_time(0.1) if triaged else None,
            "triaged_by": rng.choice(PEOPLE) if triaged else None,
            "triage_note": rng.choice(TEXTS),
        }

    def _executor(self, name: str) -> dict[str, Any]:
        rng = self.rng
        return {
            "executor_name": name,
            "executor_kind": rng.choice(KINDS[:2] if self.often(0.8) else KINDS),
            "last_tick_at": self.any_time(0.2),
            "last_tick_status": rng.choice(("ok", "warn", "error")),
            "ticks_total": rng.choice((0, 0, 1, 7, 9_223_372_036_854_775_806)),
            "current_job_id": rng.choice((None, self.uuid())),
            "lease_owner": rng.choice((None, *OWNERS)),
            "metadata": rng.choice(HELD_METADATA),
            "created_at": self.any_time(0),
        }

    def scene(self, calls: tuple[Call, ...], *, rival: bool) -> Scene:
        rng = self.rng
        earlier = timedelta(microseconds=rng.choice((1, 1_000, 1_500_000, 3_600_000_000)))
        return Scene(
            self.number,
            self.clock.isoformat(),
            rng.choice(("1 microsecond", "1 millisecond", "1 second")),
            (self.clock - earlier).isoformat(),
            self.number // CHUNK % 2 == 0,
            rival,
            dict(zip(TABLES, (self._gates(), self.jobs, self.letters, self.executors), strict=True)),
            calls,
        )

    # The calls

    def call(self, name: str) -> Call:
        """One call of a routine; that of the trigger's routine is an UPDATE of its table."""
        if name == "fn_job_queue_updated_at":
            return Call("workflow_admin", self._update())
        arguments = [
            sql.SQL("{} => {}").format(sql.Identifier(argument), sql.Literal(value))
            for argument, value in _CALLS[name](self).items()
        ]
        query = sql.SQL("SELECT public.{}({})").format(sql.Identifier(name), sql.SQL(", ").join(arguments))
        return Call(CALLER[name], query.as_string(None))

    def _update(self) -> str:
        rng = self.rng
        changes = {
            "priority": rng.randrange(1000),
            "actor": rng.choice(PEOPLE),
            "updated_at": self.any_time(),
            "last_error": rng.choice(TEXTS),
        }
        job = sql.SQL("q.job_id = {}").format(sql.Literal(rng.choice(self.jobs)["job_id"]))
        assignments = [
            sql.SQL("{} = {}").format(sql.Identifier(column), sql.Literal(changes[column]))
            for column in rng.sample(sorted(changes), rng.randrange(1, 4))
        ]
        query = sql.SQL(
            "WITH c AS (UPDATE public.job_queue AS q SET {} WHERE {} RETURNING q.*)"
            " SELECT jsonb_build_object('refused', count(*) = 0, 'rows', jsonb_agg(c ORDER BY c.job_id)) FROM c"
        ).format(sql.SQL(", ").join(assignments), rng.choice((sql.SQL("true"), sql.SQL("q.priority > 0"), job)))
        return query.as_string(None)

    def given(self, **choices: tuple[float, Callable[[], Any]]) -> dict[str, Any]:
        """Arguments that have a default: each with the share of calls that name it."""
        return {name: choose() for name, (share, choose) in choices.items() if self.often(share)}

    def leased(self) -> dict[str, Any]:
        """Mostly a job that is leased, now and then one that is not."""
        leased, others = ([job for job in self.jobs if (job["state"] in _LEASED) is is_] for is_ in (True, False))
        return self.rng.choice(leased if self.often(0.9) or not others else others)

    def text(self, *usual: str | None) -> str | None:
        """Mostly one of the usual ones, else nothing, or nothing but blanks."""
        return self.rng.choice(usual if self.often(0.92) else (None, "", "  ", "\t", "other"))


def _payload(w: _World) -> str | None:
    rng = w.rng
    if w.often(0.8):
        return rng.choice(PAYLOADS)
    if not w.often(0.7):
        return rng.choice(NO_OBJECTS)
    names = (rng.choice((name, name, name.upper(), name.title())) for name in rng.choices(DENIED_NAMES, k=2))
    text = rng.choice(DENIED)
    return text % tuple(names)[: text.count("%s")]


def _enqueue(w: _World) -> dict[str, Any]:
    rng = w.rng
    return {
        "p_job_kind": w.text(*JOB_KINDS[:3]),
        "p_actor": w.text(*PEOPLE),
        "p_idempotency_key": w.text(*(f"key {number}" for number in range(8))),
        **w.given(
            p_payload_json=(0.75, lambda: _payload(w)),
            p_source_ref=(0.5, lambda: rng.choice(REFERENCES)),
            p_target_ref=(0.5, lambda: rng.choice(REFERENCES)),
            p_payload_ref=(0.5, lambda: rng.choice(REFERENCES)),
            p_priority=(0.5, lambda: rng.choice((None, 0, 1, 100, 99) if w.often() else (-1,))),
            p_run_id=(0.5, lambda: rng.choice((None, w.uuid()))),
            p_scheduled_at=(0.5, lambda: rng.choice((None, w.any_time()))),
            p_max_attempts=(0.5, lambda: rng.choice((None, 1, 2, 5) if w.often() else (0, -1))),
        ),
    }


def _claim(w: _World) -> dict[str, Any]:
    rng = w.rng
    kinds = ("{mail.send}", "{mail.read,NULL}", "{mail.send,mail.read}", "{}", "{NULL}", "{other}", None)
    return {
        "p_lease_owner": w.text(*OWNERS[:3]),
        **w.given(
            p_job_kinds=(0.5, lambda: rng.choice(kinds)),
            p_limit=(0.75, lambda: rng.choice((None, -1, 0, 1, 2, 2, 3, 100))),
            p_lease_seconds=(0.5, lambda: rng.choice((None, -5, 0, 1, 2, 60, 301, 2_147_483_647))),
        ),
    }


def _of_lease(w: _World) -> dict[str, Any]:
    """The arguments that every call about a leased job begins with, and its fence."""
    rng, job = w.rng, w.leased()
    others = (None, *OWNERS)
    return {
        "p_job_id": job["job_id"] if w.often(0.97) else rng.choice((w.uuid(), None)),
        "p_lease_owner": job["lease_owner"] if w.often() else rng.choice(others),
        **w.given(
            p_expected_attempts=(
                0.6,
                lambda: rng.choice((job["attempts"], None) if w.often(0.9) else (0, 1, 4, 5, -1)),
            )
        ),
    }


def _fail(w: _World) -> dict[str, Any]:
    rng = w.rng
    return {
        **_of_lease(w),
        "p_error": rng.choice(TEXTS),
        **w.given(p_retryable=(0.5, lambda: rng.choice((True, False, None)))),
    }


def _extend(w: _World) -> dict[str, Any]:
    seconds = (None, None, -5, 0, 1, 2, 60, 299, 300, 301, 3600, 2_147_483_647)
    return {**_of_lease(w), **w.given(p_lease_seconds=(0.6, lambda: w.rng.choice(seconds)))}


def _tick(w: _World) -> dict[str, Any]:
    rng = w.rng
    names = [row["executor_name"] for row in w.executors]
    name = rng.choice(names) if names and w.often(0.6) else w.text("w1", "new", " new")
    held = [row["executor_kind"] for row in w.executors if row["executor_name"] == name]
    kind = rng.choice(held) if held and w.often(0.9) else rng.choice(KINDS)
    return {
        "p_executor_name": name,
        "p_executor_kind": kind if w.often() else rng.choice((None, "", "x", "MOT", "dot", "DOT ")),
        **w.given(
            p_status=(0.7, lambda: rng.choice(("ok", "warn", "error") if w.often() else (None, "", "x", "OK"))),
            p_current_job_id=(0.5, lambda: rng.choice((None, w.uuid()))),
            p_lease_owner=(0.5, lambda: rng.choice((None, *OWNERS))),
            p_metadata=(0.7, lambda: rng.choice(METADATA[:3] if w.often(0.6) else METADATA)),
        ),
    }


def _stale_check(w: _World) -> dict[str, Any]:
    seconds = (None, None, -5, 0, 1, 9, 10, 59, 60, 61, 299, 300, 301, 3600, 86_400, 2_147_483_647)
    return w.given(p_threshold_seconds=(0.8, lambda: w.rng.choice(seconds)))


def _register(w: _World) -> dict[str, Any]:
    rng = w.rng
    names = [row["executor_name"] for row in w.executors]
    seen = rng.choice(w.past)
    return {
        "p_executor_name": rng.choice(names) if names and w.often(0.1) else w.text("new", " new", "newer", "w3"),
        "p_executor_kind": rng.choice(KINDS) if w.often() else rng.choice((None, "", "x", "MOT", "dot", "DOT ")),
        "p_last_observed_at": seen if w.often(0.9) else rng.choice((None, "-infinity", "infinity", *w.future)),
        "p_actor": w.text(*PEOPLE),
        **w.given(p_note=(0.5, lambda: rng.choice(TEXTS))),
    }


def _limit(w: _World) -> dict[str, Any]:
    limits = (None, None, -1, 0, 1, 2, 2, 3, 99, 100, 101, 102, 1000)
    return w.given(p_limit=(0.75, lambda: w.rng.choice(limits)))


def _reap(w: _World) -> dict[str, Any]:
    return {"p_actor": w.text(*PEOPLE), **_limit(w)}


def _letter_id(w: _World) -> str | None:
    return w.rng.choice(w.letters)["dead_letter_id"] if w.often() else w.rng.choice((w.uuid(), None))


def _requeue(w: _World) -> dict[str, Any]:
    return {"p_dead_letter_id": _letter_id(w)}


def _triage(w: _World) -> dict[str, Any]:
    rng = w.rng
    return {
        "p_dead_letter_id": _letter_id(w),
        "p_triage_status": rng.choice(TRIAGE) if w.often() else rng.choice((None, "", "x", "Closed", "closed ")),
        "p_actor": w.text(*PEOPLE),
        **w.given(p_triage_note=(0.5, lambda: rng.choice(TEXTS))),
    }


_CALLS: dict[str, Callable[[_World], dict[str, Any]]] = {
    "fn_job_enqueue": _enqueue,
    "fn_job_claim": _claim,
    "fn_job_ack": _of_lease,
    "fn_job_fail": _fail,
    "fn_job_extend_lease": _extend,
    "fn_queue_heartbeat_tick": _tick,
    "fn_queue_stale_check": _stale_check,
    "fn_queue_heartbeat_register_passive": _register,
    "fn_job_reap_stale_leases_dry_run": _limit,
    "fn_job_reap_stale_leases_apply": _reap,
    "fn_job_dead_letter_requeue_dry_run": _requeue,
    "fn_job_dead_letter_triage_update": _triage,
}
