"""Check `proof`: what the system does and refuses, shown on made-up rows in a savepoint that is always rolled back."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

import psycopg
from postgast import pg_query_pb2 as pb
from postgast import walk
from psycopg import sql
from psycopg.pq import TransactionStatus
from pydantic import Field, model_validator

from reconciler import pg, transitions
from reconciler.allowlist import AGGREGATES, FUNCTIONS, WINDOWS, check_query
from reconciler.checks import CheckKind
from reconciler.errors import Locked, ServerProblem
from reconciler.model import (
    Asked,
    Check,
    Declared,
    Duration,
    GateStore,
    Json,
    Model,
    Need,
    Verdict,
    canonical,
    milliseconds,
)
from reconciler.parts import (
    QUERY_TIMEOUT_MS,
    Complaint,
    Context,
    identifier,
    raw,
    relation,
    role_need,
    single_value,
    table_need,
    unreadable,
)
from reconciler.syntax import Trouble, at, quote_ident, single, strings, writes

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterator, Mapping, Sequence

    from google.protobuf.message import Message

    from reconciler.syntax import Statement


# ------------------------------------------------------------------------------------------------------- the language


class Precondition(Model):
    """What must hold before the proof may touch anything; `because` is said when it does not."""

    query: str
    rows: int | None = Field(default=None, ge=0)
    equals: str | None = None
    because: str = Field(min_length=1)

    @model_validator(mode="after")
    def _one_expectation(self) -> Precondition:
        if (self.rows is None) == (self.equals is None):
            raise ValueError("write exactly one of `rows` and `equals`")
        return self


class Expectation(Model):
    """One of: `returns`; `raises`, perhaps with `message`; `query` with `equals`, `rows` or `unchanged`."""

    returns: dict[str, Json] | tuple[Json, ...] | None = None
    raises: str | None = Field(default=None, pattern="^[0-9A-Z]{5}$")
    message: str | None = None
    query: str | None = None
    equals: str | None = None
    rows: int | None = Field(default=None, ge=0)
    unchanged: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Expectation:
        if sum(one is not None for one in (self.returns, self.raises, self.query)) != 1:
            raise ValueError("write exactly one of `returns`, `raises` and `query`")
        answers = sum(one is not None for one in (self.equals, self.rows, self.unchanged))
        if answers != (self.query is not None):
            raise ValueError("`query`, and only that, goes with exactly one of `equals`, `rows` and `unchanged`")
        if self.message is not None and self.raises is None:
            raise ValueError("`message` goes with `raises`")
        return self


Written = Literal["insert", "update", "delete"]


class Pause(Model):
    """Right before or right after a statement that writes the table `on`, one inside of a function too."""

    before: Written | None = None
    after: Written | None = None
    on: str = Field(min_length=1)

    @model_validator(mode="after")
    def _one_moment(self) -> Pause:
        if (self.before is None) == (self.after is None):
            raise ValueError("write exactly one of `before` and `after`")
        return self


class Step(Model):
    """`given` and `arm` prepare, `when` is the statement on trial, `then` is what it must come to.

    With two sessions `holder` is what the other one does and keeps open while `when` runs; with `release` it does what
    `meanwhile` says and ends its transaction so, as soon as `when` waits for it, which it then must: for a lock, or at
    `pause`.
    """

    given: tuple[str, ...] = ()
    arm: dict[str, str | None] = {}
    holder: tuple[str, ...] = ()
    pause: Pause | None = None
    meanwhile: tuple[str, ...] = ()
    release: Literal["commit", "rollback"] | None = None
    as_: str | None = Field(default=None, alias="as", min_length=1)
    when: str
    within: Duration | None = None
    then: tuple[Expectation, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_end(self) -> Step:
        if sum(one.raises is not None for one in self.then) > 1:
            raise ValueError("a statement raises one error; write `raises` once")
        if any(one.raises for one in self.then) and any(one.returns is not None for one in self.then):
            raise ValueError("a statement that raises returns nothing; write `raises` or `returns`")
        return self


class SingleProof(Step):
    """A proof of one step, written without `steps`."""

    reason: str = Field(min_length=1)
    requires: tuple[Precondition, ...] = ()
    advances: tuple[str, ...] = ()
    sessions: Literal[1, 2] = 1


class SteppedProof(Model):
    """A proof of several steps. Each goes on where the one before ended; with two sessions, where its `given` ended."""

    reason: str = Field(min_length=1)
    requires: tuple[Precondition, ...] = ()
    advances: tuple[str, ...] = ()
    sessions: Literal[1, 2] = 1
    steps: tuple[Step, ...] = Field(min_length=1)


class ProofSpec(Model):
    """A proof, resolved. `stores`: where the row of each armed gate lives."""

    reason: str
    requires: tuple[Precondition, ...]
    advances: tuple[str, ...]
    sessions: Literal[1, 2]
    steps: tuple[Step, ...]
    stores: dict[str, GateStore]


STATEMENTS = frozenset(
    """
    call_stmt constraints_set_stmt create_table_as_stmt delete_stmt insert_stmt merge_stmt select_stmt update_stmt
    """.split()
)
"""What `given`, `holder`, `meanwhile` and `when` may be. All of it is undone by ROLLBACK TO SAVEPOINT."""

VOLATILE = frozenset(
    """
    clock_timestamp current_setting currval format gen_random_uuid lastval lpad nextval pg_backend_pid
    pg_current_xact_id pg_sleep pg_try_advisory_xact_lock random repeat rpad set_config setval timeofday uuidv4 uuidv7
    """.split()
)
"""Functions of pg_catalog that a proof may call beside those of the allowlist; use of a sequence is detected later."""

ESCAPING = ("dblink", "lo_", "pg_", "set_config")
"""Names that are refused where the grammar hides a call: after a dot, and in every schema for dblink."""


def statement_troubles(text: str) -> list[Trouble]:
    """What is wrong with a statement of a proof: it must be one, undone by a rollback, and call nothing that is not."""
    return list(_troubles(text))


@lru_cache(maxsize=1024)  # asked when the files are read, and again when the proof is played
def _troubles(text: str) -> tuple[Trouble, ...]:
    statement, troubles = single(text)
    if statement is None:
        return tuple(troubles)
    kind = statement.node.WhichOneof("node") or ""
    if kind not in STATEMENTS:
        word = text.encode()[statement.start :].decode().split(maxsplit=1)[0].upper()
        message = f"{word} is not allowed in a proof: only SELECT, INSERT, UPDATE, DELETE, MERGE, VALUES, CALL,"
        return (at(text, statement.start, f"{message} CREATE TEMP TABLE AS and SET CONSTRAINTS"),)
    return tuple(at(text, place, message) for place, message in _escapes(statement))


def _escapes(statement: Statement) -> Iterator[tuple[int, str]]:
    if statement.node.HasField("create_table_as_stmt"):
        into = statement.node.create_table_as_stmt
        if into.into.rel.relpersistence != "t" or into.objtype != pb.OBJECT_TABLE:
            yield statement.start, "only a temporary table may be created here"
        if into.query.HasField("execute_stmt"):
            yield statement.start, "EXECUTE is not allowed in a proof"
    for node in _nodes(statement.node):
        if isinstance(node, pb.FuncCall) and (message := _refused_call(node)):
            yield node.location, message
        elif isinstance(node, pb.SelectStmt) and node.HasField("into_clause"):
            yield statement.start, "SELECT INTO is not allowed in a proof; write CREATE TEMP TABLE AS"
        elif isinstance(node, pb.ColumnRef) and len(node.fields) > 1 and _hidden_call(node.fields[-1]):
            yield node.location, f"{node.fields[-1].string.sval} could be a call of a function"
        elif isinstance(node, pb.A_Indirection) and any(map(_hidden_call, node.indirection)):
            yield statement.start, "a field of this name could be a call of a function"
        elif isinstance(node, pb.ParamRef):
            yield node.location, "there are no parameters in a proof"


def _nodes(tree: pb.Node) -> Iterator[Message]:
    return (message for _, message in walk(tree))


def _hidden_call(node: pb.Node) -> bool:
    return node.HasField("string") and node.string.sval.startswith(ESCAPING)


def _refused_call(node: pb.FuncCall) -> str:
    """Why this call is refused; empty when it may be made."""
    names = strings(node.funcname)
    name = names[-1]
    if name.startswith("dblink"):
        return f"{name} works over a connection of its own, which no rollback reaches"
    if len(names) > 1 and names[:-1] != ("pg_catalog",):
        return ""  # a function of the system: what it does is on trial
    if name not in FUNCTIONS | AGGREGATES | WINDOWS | VOLATILE:
        if len(names) == 1:
            return f"{name} is no built-in function that a proof may call; write any other with its schema"
        return f"a proof may not call {name}: its effect could outlive a rollback"
    if name == "set_config" and not (len(node.args) == 3 and node.args[2].a_const.boolval.boolval):
        return "set_config must be local here: write true as its third argument"
    return ""


class Proof(CheckKind):
    """Plays each proof inside an apply, just before COMMIT, and undoes it."""

    name = "proof"
    section = "proofs"
    order = 30

    def forms(self) -> Sequence[type[Model]]:
        """One step, or several."""
        return (SingleProof, SteppedProof)

    def form(self, data: Json) -> tuple[type[Model] | None, str]:
        """`steps` tells."""
        return (SteppedProof if isinstance(data, dict) and "steps" in data else SingleProof), ""

    def declare(
        self, name: str, declaration: Model, context: Context, items: Mapping[str, Declared]
    ) -> tuple[Model | None, list[Complaint]]:
        """Hold every statement against the language and every query against the allowlist; find the gates."""
        problems: list[Complaint] = []
        if not isinstance(declaration, SingleProof | SteppedProof):
            raise TypeError(declaration)
        steps: dict[tuple[str | int, ...], Step]
        if isinstance(declaration, SteppedProof):
            steps = {("steps", number): step for number, step in enumerate(declaration.steps)}
        else:
            only = declaration.model_dump(by_alias=True, exclude={"reason", "requires", "advances", "sessions"})
            steps = {(): Step.model_validate_json(canonical(only))}
        spec = ProofSpec(
            reason=declaration.reason,
            requires=declaration.requires,
            advances=declaration.advances,
            sessions=declaration.sessions,
            steps=tuple(steps.values()),
            stores=_stores(steps.values(), items),
        )
        for path, text, what in _texts(spec, tuple(steps)):
            troubles = (
                check_query(text, context.policy.allow_functions).troubles
                if what == "query"
                else statement_troubles(text)
            )
            problems += [Complaint(path, trouble.message) for trouble in troubles]
        problems += _complaints(declaration, steps)
        return (None if problems else spec), problems

    def load(self, spec: Json) -> Model:
        """A resolved proof from JSON types."""
        return ProofSpec.model_validate_json(canonical(spec))

    def needs(self, check: Check) -> tuple[Need, ...]:
        """To become whom it acts as, to write what it is given and arms, to read what it asks. Rehearsed ones: nothing.

        What a function needs that it calls is on trial.
        """
        spec = check.spec
        if not isinstance(spec, ProofSpec) or spec.sessions == 2:
            return ()
        roles = sorted({step.as_ for step in spec.steps if step.as_ is not None})
        found = [role_need(check.address, "SET", role) for role in roles]
        for step in spec.steps:
            # A refusal that is expected may be for want of this very privilege.
            own = () if step.as_ is not None or any(one.raises for one in step.then) else (step.when,)
            written = [write for text in (*step.given, *own) for write in writes(text)]
            found += [table_need(check.address, write.verb, write.table) for write in written]
            for gate, value in step.arm.items():
                verb = "DELETE" if value is None else "UPDATE"
                found.append(table_need(check.address, verb, spec.stores[gate].table))
        return (*found, *super().needs(check))

    def run(self, conn: pg.Connection, check: Check, asked: Asked) -> Verdict:
        """Play it, when asked inside an apply."""
        spec = check.spec
        if not isinstance(spec, ProofSpec):
            raise TypeError(spec)
        if spec.sessions == 2 and asked.inside and check.address in asked.rehearsed:
            return asked.rehearsed[check.address]
        if spec.sessions == 2 or not asked.inside:
            return self.planned(check)
        return _in_savepoint(conn, check, spec, asked)

    def planned(self, check: Check) -> Verdict:
        """When it will be played."""
        alone = getattr(check.spec, "sessions", 1) == 1
        detail = "runs inside the apply" if alone else "needs a rehearsal: reconciler prove --rehearse"
        return Verdict(address=check.address, status="deferred", detail=detail)


def _stores(steps: Collection[Step], items: Mapping[str, Declared]) -> dict[str, GateStore]:
    """The store of each armed gate that is declared."""
    found: dict[str, GateStore] = {}
    for gate in sorted({gate for step in steps for gate in step.arm}):
        item = items.get(f"gate.{gate}")
        if item is not None:
            found[gate] = cast("Any", item.rules).store
    return found


def _texts(
    spec: ProofSpec, paths: Sequence[tuple[str | int, ...]]
) -> Iterator[tuple[tuple[str | int, ...], str, Literal["query", "statement"]]]:
    """Every SQL text with its place in the declaration."""
    for number, need in enumerate(spec.requires):
        yield ("requires", number, "query"), need.query, "query"
    for path, step in zip(paths, spec.steps, strict=True):
        for key, texts in (("given", step.given), ("holder", step.holder), ("meanwhile", step.meanwhile)):
            for number, text in enumerate(texts):
                yield (*path, key, number), text, "statement"
        yield (*path, "when"), step.when, "statement"
        for number, one in enumerate(step.then):
            if one.query is not None:
                yield (*path, "then", number, "query"), one.query, "query"


def _complaints(
    declaration: SingleProof | SteppedProof, steps: Mapping[tuple[str | int, ...], Step]
) -> Iterator[Complaint]:
    for path, step in steps.items():
        if declaration.sessions == 1:
            for key in ("holder", "within", "release", "meanwhile", "pause"):
                if getattr(step, key):
                    yield Complaint((*path, key), f"`{key}` needs `sessions: 2`")
        else:
            yield from _complaints_of_two(path, step)
    for number, text in enumerate(declaration.advances):
        try:
            relation(text)
        except ValueError as error:
            yield Complaint(("advances", number), str(error))


def _complaints_of_two(path: tuple[str | int, ...], step: Step) -> Iterator[Complaint]:
    if not (step.holder or step.pause):
        message = "`sessions: 2` needs `holder`: what the other session does and keeps open"
        yield Complaint(path or ("sessions",), message)
    for key in ("meanwhile", "pause"):
        if getattr(step, key) and step.release is None:
            yield Complaint((*path, key), f"`{key}` needs `release`: how the other session ends its transaction")
    if step.pause is not None:
        try:
            relation(step.pause.on)
        except ValueError as error:
            yield Complaint((*path, "pause", "on"), str(error))


def armed(spec: ProofSpec) -> Iterator[tuple[int, str]]:
    """Every gate that is armed, with the number of its step from 0."""
    return ((number, gate) for number, step in enumerate(spec.steps) for gate in step.arm)


def refuses(spec: ProofSpec, schema: str, name: str, arguments: int, gate: str) -> bool:
    """Does a step call the function `schema.name` and expect that this gate makes it refuse?

    The refusal names the gate: a text of `returns` that starts with `<gate>=`, or a `message` that holds its name.
    arguments: how many the function takes at most. A proof for two sessions does not count, no apply runs it.
    """
    if spec.sessions == 2:
        return False
    for step in spec.steps:
        returned = any(text.startswith(f"{gate}=") for one in step.then for text in _leaves(one.returns))
        raised = any(one.message is not None and gate in one.message for one in step.then)
        if (returned or raised) and _calls(step.when, schema, name, arguments):
            return True
    return False


@lru_cache(maxsize=1024)  # asked for every gate of every function
def _calls(text: str, schema: str, name: str, arguments: int) -> bool:
    statement, _ = single(text)
    return statement is not None and any(
        isinstance(node, pb.FuncCall) and strings(node.funcname) == (schema, name) and len(node.args) <= arguments
        for node in _nodes(statement.node)
    )


def _leaves(value: Json) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for inner in cast("dict[str, Json]", value).values():
                yield from _leaves(inner)
        case list() | tuple():
            for inner in cast("Sequence[Json]", value):
                yield from _leaves(inner)
        case _:
            pass


# -------------------------------------------------------------------------------------------------------- the playing


class _Failed(Exception):
    """The proof does not hold. The text says in which step, what was expected and what was found."""


class _NotJudged(Exception):
    """The proof could not be played: (what is missing, sentence)."""


@dataclass
class _Session:
    """Whether the settings of a session are a caller's, and nothing has run since they were made so."""

    as_a_caller: bool = False


@dataclass(frozen=True)
class _Stage:
    """Where a proof plays: a transaction, under which path and time-out, and how far the proof has come."""

    conn: pg.Connection
    path: str
    timeout_ms: int
    transaction: str
    session: _Session
    where: str = ""

    def at(self, place: str) -> _Stage:
        """The same stage, one place further in."""
        return replace(self, where=f"{self.where}{place}: ")


@dataclass(frozen=True)
class _Came:
    """What a statement came to: rows, or the error that it raised. `value`: the one JSON value of the one row."""

    rows: Sequence[Json] = ()
    value: tuple[Json, ...] = ()
    error: psycopg.Error | None = None


def _in_savepoint(conn: pg.Connection, check: Check, spec: ProofSpec, asked: Asked) -> Verdict:
    """Play the proof, undo it, and look for what the undoing did not reach."""
    transitions.track(conn)
    if hidden := transitions.uncounted(conn):
        return Verdict(address=check.address, status="not_judged", detail=hidden[1], missing=hidden[0])
    before = _outliving(conn)
    pg.run(conn, "SAVEPOINT reconciler_proof")
    status, detail, missing, foreign = "passed", _size(spec), "", set[str]()
    try:
        stage = _stage(conn, asked)
        _ready(stage, spec, asked)
        for number, step in enumerate(spec.steps, 1):
            here = stage.at(f"step {number}") if len(spec.steps) > 1 else stage
            _prepare(here, step, spec)
            _try(here, step)
        _end(stage)
        foreign = _foreign_tables(conn)
    except _Failed as failure:
        status, detail = "failed", str(failure)
    except _NotJudged as obstacle:
        status, (missing, detail) = "not_judged", obstacle.args
    pg.run(conn, "ROLLBACK TO SAVEPOINT reconciler_proof")
    pg.run(conn, "RELEASE SAVEPOINT reconciler_proof")
    escaped = sorted(foreign - before.foreign) + _escaped(conn, before, spec.advances)
    if escaped:
        detail = f"escaped the rollback: {', '.join(escaped)}" + (f"; {detail}" if status != "passed" else "")
        status = "failed"
    return Verdict(address=check.address, status=cast("Any", status), detail=detail, missing=missing)


def rehearse(conn: pg.Connection, other: pg.Connection, check: Check, asked: Asked) -> Verdict:
    """Play a proof for two sessions. Only on a rehearsal: what is given is committed, so that `other` can see it.

    `other` does what `holder` says and keeps its transaction open while `when` runs, or until `when` waits for it.
    Gates are put back afterwards.
    """
    spec = check.spec
    if not isinstance(spec, ProofSpec):
        raise TypeError(spec)
    status, detail, missing = "rehearsed", _size(spec), ""
    restore = {gate: _gate_value(conn, store, gate) for gate, store in spec.stores.items()}
    try:
        stage = _begun(conn, asked)
        _ready(stage, spec, asked)
        pg.run(conn, "COMMIT")
        for number, step in enumerate(spec.steps, 1):
            _with_holder(conn, other, step, spec, asked, f"step {number}: " if len(spec.steps) > 1 else "")
    except _Failed as failure:
        status, detail = "failed", str(failure)
    except _NotJudged as obstacle:
        status, (missing, detail) = "not_judged", obstacle.args
    finally:
        for one in (conn, other):
            if not (one.closed or one.broken):
                one.rollback()
    _arm(_begun(conn, asked), restore, spec.stores)
    pg.run(conn, "COMMIT")
    return Verdict(address=check.address, status=cast("Any", status), detail=detail, missing=missing)


def _with_holder(  # noqa: PLR0913, PLR0917 - two sessions, one step of one proof, asked so, and where it stands
    conn: pg.Connection, other: pg.Connection, step: Step, spec: ProofSpec, asked: Asked, where: str
) -> None:
    """One step for two sessions; what it did after its `given` is rolled back. Raises _Failed, _NotJudged."""
    stage = replace(_begun(conn, asked), where=where)
    _prepare(stage, step, spec)
    pg.run(conn, "COMMIT")
    with _pausing(conn, other, step.pause):
        held = replace(_begun(other, asked), where=where)
        if step.pause is not None:
            pg.run(other, sql.SQL("SELECT pg_catalog.pg_advisory_xact_lock({})").format(PAUSE))
        for number, text in enumerate(step.holder, 1):
            _must(held.at(f"holder {number}"), text)
        within = milliseconds(step.within or asked.desired.policy.apply.statement_timeout)
        stage = replace(_begun(conn, asked), timeout_ms=within, where=where)
        with _released(conn, held, step, within):
            _try(stage, step)
        _end(stage)


PAUSE = sql.Literal(int.from_bytes(b"pause"))
"""The advisory lock that the holder has while `when` is to wait at `pause`."""


@contextmanager
def _pausing(conn: pg.Connection, other: pg.Connection, pause: Pause | None) -> Generator[None]:
    """While the block runs, whoever writes as `pause` says waits for whoever has the lock. Ends both transactions."""
    names: dict[str, sql.Composable] = {}
    if pause is not None:
        schema, _ = relation(pause.on)
        names = {
            "function": sql.Identifier(schema, "reconciler_pause"),
            "table": identifier(pause.on),
            "moment": sql.SQL("BEFORE" if pause.before else "AFTER"),
            "event": raw((pause.before or pause.after or "").upper()),
            "lock": PAUSE,
        }
        function = sql.SQL(
            "CREATE FUNCTION {function}() RETURNS pg_catalog.trigger LANGUAGE plpgsql SET search_path = pg_catalog AS"
            " $$BEGIN PERFORM pg_advisory_xact_lock({lock}); RETURN NULL; END$$"
        )
        trigger = sql.SQL(
            "CREATE TRIGGER reconciler_pause {moment} {event} ON {table} FOR EACH STATEMENT"
            " EXECUTE FUNCTION {function}()"
        )
        _both(conn, function.format(**names), trigger.format(**names), doing=f"making the pause on {pause.on}")
    try:
        yield
    finally:
        for one in (conn, other):
            if not (one.closed or one.broken):
                one.rollback()
        if pause is not None and not (conn.closed or conn.broken):
            drop = sql.SQL("DROP TRIGGER reconciler_pause ON {table}"), sql.SQL("DROP FUNCTION {function}()")
            _both(conn, *(one.format(**names) for one in drop), doing=f"removing the pause on {pause.on}")


def _both(conn: pg.Connection, *statements: sql.Composed, doing: str) -> None:
    """All of them in a transaction of their own."""
    pg.run(conn, "BEGIN")
    for statement in statements:
        pg.run(conn, statement, doing)
    pg.run(conn, "COMMIT")


@contextmanager
def _released(conn: pg.Connection, held: _Stage, step: Step, within: int) -> Generator[None]:
    """While the block runs: once `conn` waits for the holder, let it do `meanwhile` and end as `release` says.

    within: milliseconds after which nobody waits any more. Raises _Failed when `conn` does not wait, and what
    `meanwhile` raises.
    """
    if step.release is None:
        yield
        return
    waiter, done = conn.info.backend_pid, threading.Event()

    def watch() -> bool:
        until = time.monotonic() + within / 1000
        while not done.wait(0.005) and time.monotonic() < until:
            query = "SELECT pg_catalog.pg_backend_pid() = ANY (pg_catalog.pg_blocking_pids(%s)) AS waits"
            if pg.rows(held.conn, query, (waiter,))[0]["waits"]:
                try:
                    for number, text in enumerate(step.meanwhile, 1):
                        _must(held.at(f"meanwhile {number}"), text)
                except BaseException:
                    held.conn.rollback()  # or `when` would wait for ever
                    raise
                pg.run(held.conn, "COMMIT" if step.release == "commit" else "ROLLBACK")
                return True
        return False

    with ThreadPoolExecutor(max_workers=1) as pool:
        watcher = pool.submit(watch)
        try:
            yield
        finally:
            done.set()
            waited = watcher.result()  # what went wrong there is why anything went wrong here
    if not waited:
        raise _Failed(f"{held.where}the statement did not wait for the holder")


def _begun(conn: pg.Connection, asked: Asked) -> _Stage:
    pg.run(conn, "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
    pg.settings(conn, milliseconds(asked.desired.policy.apply.statement_timeout))
    return _stage(conn, asked)


def _stage(conn: pg.Connection, asked: Asked) -> _Stage:
    policy = asked.desired.policy.apply
    xid: str = pg.rows(conn, "SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text AS xid")[0]["xid"]
    path = ", ".join(map(quote_ident, policy.search_path))
    return _Stage(conn, path, milliseconds(policy.statement_timeout), xid, _Session())


def _size(spec: ProofSpec) -> str:
    steps, expectations = len(spec.steps), sum(len(step.then) for step in spec.steps)
    return f"{steps} step{'' if steps == 1 else 's'}, {expectations} expectation{'' if expectations == 1 else 's'} met"


def _ready(stage: _Stage, spec: ProofSpec, asked: Asked) -> None:
    """Before anything is touched: texts, roles, privileges and preconditions. Raises _Failed, _NotJudged."""
    relations: set[str] = set()
    # Again and with the installed policy: a plan may come from whoever wrote its files (DESIGN rule 3).
    for _, text, what in _texts(spec, [("step", number) for number in range(len(spec.steps))]):
        if what == "statement":
            troubles = statement_troubles(text)
            if troubles:
                raise _Failed(f"a statement is not allowed in a proof: {troubles[0].message}")
            continue
        report = check_query(text, asked.allow_functions)
        if report.troubles:
            message = f"the installed policy does not allow a query: {report.troubles[0].message}"
            raise _NotJudged("allow_functions", message)
        relations.update(report.relations)
    for role in sorted({step.as_ for step in spec.steps if step.as_ is not None}):
        _may_become(stage.conn, role)
    if missing := unreadable(stage.conn, sorted(relations)):
        raise _NotJudged(*missing)
    for number, need in enumerate(spec.requires, 1):
        found = _asked(stage.at(f"requires {number}"), need.query, need.equals)
        if found != _words(need):
            raise _NotJudged("precondition", f"{need.because} (found {found}, required {_words(need)})")


def _may_become(conn: pg.Connection, role: str) -> None:
    option = "SET" if conn.info.server_version >= 160_000 else "MEMBER"
    query = "SELECT pg_catalog.pg_has_role(r.oid, %s) AS may FROM pg_catalog.pg_roles r WHERE r.rolname = %s"
    found = pg.rows(conn, query, (option, role))
    if not found:
        raise _NotJudged(f"role {role}", f"there is no role {role}")
    if not found[0]["may"]:
        missing = f"membership with SET in role {role}"
        raise _NotJudged(missing, f"this role lacks {missing}")


def _prepare(stage: _Stage, step: Step, spec: ProofSpec) -> None:
    for number, text in enumerate(step.given, 1):
        _must(stage.at(f"given {number}"), text)
    _arm(stage.at("arm"), step.arm, spec.stores)


def _arm(stage: _Stage, gates: Mapping[str, str | None], stores: Mapping[str, GateStore]) -> None:
    """Give each gate the text; None removes its row."""
    for gate, value in gates.items():
        store = stores[gate]
        names = {
            "table": identifier(store.table),
            "key": sql.Identifier(store.key),
            "value": sql.Identifier(store.value),
            "gate": sql.Literal(gate),
            "text": sql.Literal(value),
        }
        if value is None:
            _must(stage, sql.SQL("DELETE FROM {table} WHERE {key} = {gate}").format(**names))
            continue
        update = sql.SQL("UPDATE {table} SET {value} = {text} WHERE {key} = {gate} RETURNING 1 AS done")
        if not _must(stage, update.format(**names)).rows:
            _must(stage, sql.SQL("INSERT INTO {table} ({key}, {value}) VALUES ({gate}, {text})").format(**names))
        # A trigger may have made something else of it.
        stored = sql.SQL("SELECT 1 AS done FROM {table} WHERE {key} = {gate} AND {value} = {text}")
        if not _must(stage, stored.format(**names)).rows:
            raise _Failed(f"{stage.where}{gate} does not keep the value {value!r}")


def _gate_value(conn: pg.Connection, store: GateStore, gate: str) -> str | None:
    query = sql.SQL("SELECT {}::pg_catalog.text AS value FROM {} WHERE {} = %s").format(
        sql.Identifier(store.value), identifier(store.table), sql.Identifier(store.key)
    )
    found = pg.rows(conn, query, (gate,), doing=f"reading gate {gate}")
    return found[0]["value"] if found else None


def _try(stage: _Stage, step: Step) -> None:
    """Run `when` between two looks, and hold what it came to against `then`. Raises _Failed."""
    before = {
        number: _fingerprint(stage.at(f"then {number}"), one.query)
        for number, one in enumerate(step.then, 1)
        if one.query is not None and one.unchanged
    }
    came = _when(stage.at("when"), step)
    if came.error is not None and not any(one.raises for one in step.then):
        raise _Failed(f"{stage.where}when: {pg.translated(came.error).message}")
    for number, one in enumerate(step.then, 1):
        here = stage.at(f"then {number}")
        if wrong := _wrong(here, one, came, before.get(number)):
            raise _Failed(f"{here.where}{wrong}")


def _when(stage: _Stage, step: Step) -> _Came:
    """The statement on trial, as its role, in a savepoint of its own so that an expected error can be undone."""
    conn = stage.conn
    stage.session.as_a_caller = False
    pg.run(conn, sql.SQL("SELECT {}; SAVEPOINT reconciler_when").format(_callers(stage)))
    try:
        if step.as_ is not None:
            conn.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(step.as_)))
        came = _sent(conn, step.when.encode())
    except psycopg.Error as error:
        _not_ours_to_judge(error, conn, step)
        pg.run(conn, "ROLLBACK TO SAVEPOINT reconciler_when")
        came = _Came(error=error)
    _still_ours(stage)
    if step.as_ is not None and came.error is None:
        pg.run(conn, "SET LOCAL ROLE NONE; RELEASE SAVEPOINT reconciler_when")
    else:
        pg.run(conn, "RELEASE SAVEPOINT reconciler_when")
    return came


def _must(stage: _Stage, statement: str | sql.Composable) -> _Came:
    """Run a statement that has to work. Raises _NotJudged for a missing privilege, _Failed for any other error."""
    _as_a_caller(stage)
    text = statement.encode() if isinstance(statement, str) else statement.as_bytes(stage.conn)
    try:
        came = _sent(stage.conn, text)
    except psycopg.Error as error:
        _not_ours_to_judge(error, stage.conn)
        message = f"{stage.where}{pg.translated(error).message}"
        if error.sqlstate == "42501":
            raise _NotJudged("a privilege to prepare the proof", message) from error
        raise _Failed(message) from error
    _still_ours(stage, going_on=True)
    return came


def _sent(conn: pg.Connection, text: bytes) -> _Came:
    """By the extended protocol (that is what `binary` chooses), which refuses a second statement in the same string."""
    cursor = conn.execute(text, binary=True)
    if cursor.description is None:
        return _Came()
    rows = [{name: _plain(value) for name, value in row.items()} for row in cursor]
    is_json = len(cursor.description) == 1 and cursor.description[0].type_code in JSON_TYPES
    value = tuple(rows[0].values()) if is_json and len(rows) == 1 else ()
    return _Came(rows, value)


JSON_TYPES = {114, 3802}
"""pg_type.oid of json and jsonb."""


def _plain(value: object) -> Json:
    """What the driver made of a value, as JSON has it; what JSON does not have, as text."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return {str(key): _plain(inner) for key, inner in cast("dict[object, object]", value).items()}
        case list() | tuple():
            return [_plain(inner) for inner in cast("Sequence[object]", value)]
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case _:
            return str(value)


def _not_ours_to_judge(error: psycopg.Error, conn: pg.Connection, step: Step | None = None) -> None:
    """Raise what says nothing about the system on trial: a lost connection, and a lock that somebody else holds."""
    if step is not None and error.sqlstate in {one.raises for one in step.then}:
        return
    problem = pg.translated(error)
    if conn.closed or conn.broken or isinstance(problem, Locked):
        raise problem from error


def _still_ours(stage: _Stage, *, going_on: bool = False) -> None:
    """Whatever ran, it ran in the transaction that will be rolled back. Raises ServerProblem, which ends everything.

    going_on: in the same message, the settings are made a caller's again.
    """
    query = sql.SQL("SELECT pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text AS xid{}").format(
        sql.SQL(", {}").format(_callers(stage)) if going_on else sql.SQL("")
    )
    if (
        stage.conn.info.transaction_status != TransactionStatus.INTRANS
        or pg.rows(stage.conn, query)[0]["xid"] != stage.transaction
    ):
        raise ServerProblem(
            f"{stage.where}the statement ended the transaction of the proof.",
            hint="What it did may stand. A proof must never end its transaction; find out how it could.",
        )
    stage.session.as_a_caller = going_on


def _as_a_caller(stage: _Stage) -> None:
    """Settings as a caller of the system has them, for the one statement that follows."""
    if not stage.session.as_a_caller:
        pg.run(stage.conn, sql.SQL("SELECT {}").format(_callers(stage)))
    stage.session.as_a_caller = False


def _callers(stage: _Stage) -> sql.Composed:
    return _settings(stage.path, "on", stage.timeout_ms)


def _as_a_judge(stage: _Stage) -> None:
    """Settings as every declared query has them: nothing is found by chance, nothing is hidden by row security."""
    stage.session.as_a_caller = False
    pg.run(stage.conn, sql.SQL("SELECT {}").format(_settings("", "off", QUERY_TIMEOUT_MS)))


def _settings(path: str, row_security: str, timeout_ms: int) -> sql.Composed:
    """Columns of a SELECT that make the settings for the rest of the transaction."""
    return sql.SQL(
        "pg_catalog.set_config('search_path', {}, true) AS path,"
        " pg_catalog.set_config('row_security', {}, true) AS security,"
        " pg_catalog.set_config('statement_timeout', {}, true) AS timeout"
    ).format(path, row_security, str(timeout_ms))


def _wrong(stage: _Stage, one: Expectation, came: _Came, before: str | None) -> str:
    """What about this expectation is not met; empty when it is."""
    if one.query is not None:
        if one.unchanged:
            wanted, found = before, _fingerprint(stage, one.query)
        else:
            wanted, found = _words(one), _asked(stage, one.query, one.equals)
        return "" if found == wanted else f"found {found}, expected {wanted}"
    if one.raises is not None:
        if came.error is None:
            return f"no error, expected SQLSTATE {one.raises}; it returned {_short(came.value or came.rows)}"
        message = pg.translated(came.error).message
        met = came.error.sqlstate == one.raises and (one.message or "") in message
        return "" if met else f"raised {message}, expected {one.raises} {one.message or ''}".rstrip()
    answer = came.rows[0] if isinstance(one.returns, dict) and len(came.rows) == 1 else came.rows
    return _difference(one.returns, came.value[0] if came.value else answer)


def _words(one: Expectation | Precondition) -> str:
    return one.equals if one.equals is not None else f"{one.rows} rows"


def _asked(stage: _Stage, query: str, equals: str | None) -> str:
    """The answer of a declared query in words: its one value when a value is wanted, else its number of rows."""
    _as_a_judge(stage)
    try:
        if equals is not None:
            value, error = single_value(stage.conn, query, "")
            return value if value is not None else f"a query that {error}"
        counted = sql.SQL("SELECT pg_catalog.count(*) AS found FROM (SELECT FROM ({}\n) AS q LIMIT {}) AS counted")
        limit = sql.Literal(MAX_ROWS)
        return f"{pg.rows(stage.conn, counted.format(raw(query), limit))[0]['found']} rows"
    except ServerProblem as problem:
        raise _query_failed(stage, problem) from problem


MAX_ROWS = 100_000


def _fingerprint(stage: _Stage, query: str) -> str:
    """Number of rows and digest of all of them, in no order, by the server's text of each row."""
    _as_a_judge(stage)
    text = sql.SQL(
        "SELECT pg_catalog.count(*) || ' rows ' || pg_catalog.left(pg_catalog.encode(pg_catalog.sha256("
        "pg_catalog.convert_to(coalesce(pg_catalog.string_agg(answer::pg_catalog.text, E'\\n'"
        " ORDER BY answer::pg_catalog.text COLLATE \"C\"), ''), 'UTF8')), 'hex'), 16) AS found FROM ({}\n) AS answer"
    )
    try:
        return pg.rows(stage.conn, text.format(raw(query)))[0]["found"]
    except ServerProblem as problem:
        raise _query_failed(stage, problem) from problem


def _query_failed(stage: _Stage, problem: ServerProblem) -> Exception:
    if stage.conn.closed or stage.conn.broken:
        return problem
    return _Failed(f"{stage.where}the query failed: {problem.message}")


def _difference(expected: Json, found: Json, path: str = "") -> str:
    """The first place where `found` lacks something that is expected; empty when there is none.

    Objects may have more keys than expected, lists have exactly the elements expected, in their order.
    """
    place = f"{path}: " if path else ""
    if isinstance(expected, dict) and isinstance(found, dict):
        wanted, has = cast("dict[str, Json]", expected), cast("dict[str, Json]", found)
        for key, value in wanted.items():
            inner = f"{path}.{key}" if path else key
            if key not in has:
                return f"{inner}: missing, expected {_short(value)}"
            if wrong := _difference(value, has[key], inner):
                return wrong
        return ""
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        values, others = cast("Sequence[Json]", expected), cast("Sequence[Json]", found)
        if len(values) != len(others):
            return f"{place}{len(others)} elements, expected {len(values)}: {_short(others)}"
        pairs = zip(values, others, strict=True)
        return next(
            (wrong for at, (value, other) in enumerate(pairs) if (wrong := _difference(value, other, f"{path}[{at}]"))),
            "",
        )
    same = expected == found and isinstance(expected, bool) == isinstance(found, bool)
    return "" if same else f"{place}found {_short(found)}, expected {_short(expected)}"


def _short(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _end(stage: _Stage) -> None:
    """A deferred constraint never fires in what is rolled back: make it."""
    _as_a_caller(stage)
    try:
        stage.conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
    except psycopg.Error as error:
        _not_ours_to_judge(error, stage.conn)
        raise _Failed(f"a deferred constraint does not hold: {pg.translated(error).message}") from error
    _still_ours(stage)


# ------------------------------------------------------------------------------------------ what a rollback leaves


@dataclass(frozen=True)
class _Outliving:
    """What ROLLBACK TO SAVEPOINT does not undo, as it was before the proof."""

    session: set[str]
    sequences: dict[str, str]
    foreign: set[str]
    calls: Mapping[str, int | None]
    locks: set[tuple[Any, ...]]


def _outliving(conn: pg.Connection) -> _Outliving:
    # The locks last: reading takes some itself, which must be there on both sides of the comparison.
    session = _session(conn)
    foreign = _foreign_tables(conn)
    sequences = _sequences(conn)
    calls = transitions.calls(conn)
    pg.rows(conn, _NAMES, ([],))
    return _Outliving(session, sequences, foreign, calls, transitions.locks(conn))


def _escaped(conn: pg.Connection, before: _Outliving, advances: Sequence[str]) -> list[str]:
    """What is there that was not before the proof, a phrase each."""
    found = sorted(_session(conn) - before.session) + transitions.called(conn, before.calls)
    moved = {name for name, value in _sequences(conn).items() if before.sequences.get(name, value) != value}
    # nextval() and setval() keep their lock to the end of the transaction, whatever becomes of the savepoint; so it
    # tells our own use of a sequence from everybody else's, which its value does not.
    new = transitions.locks(conn) - before.locks
    relations = [int(lock[2]) for lock in new if lock[0] == "relation"]
    names = pg.rows(conn, _NAMES, (relations,))
    moved |= {row["name"] for row in names if row["relkind"] == "S"}
    large = [row["name"] for row in names if row["name"] == "pg_catalog.pg_largeobject"]
    found += ["large objects were used, which can be files by now"] * len(large)
    others = (row["name"] for row in names if row["relkind"] != "S" and row["name"] not in LARGE_OBJECTS)
    found += [f"the lock on {name}" for name in others]
    found += [f"advisory lock {lock[3]}/{lock[4]}" for lock in sorted(new, key=str) if lock[0] == "advisory"]
    return found + [f"sequence {name} advanced" for name in sorted(moved - set(advances))]


LARGE_OBJECTS = frozenset({"pg_catalog.pg_largeobject", "pg_catalog.pg_largeobject_loid_pn_index"})
"""What every use of a large object, lo_export() too, keeps locked to the end of the transaction."""


def _session(conn: pg.Connection) -> set[str]:
    """What this session holds beyond a transaction, the connections of postgres_fdw included."""
    found = {row["what"] for row in pg.rows(conn, _SESSION)}
    for row in pg.rows(conn, _CONNECTIONS):
        query = sql.SQL("SELECT coalesce(server_name, 'one that was dropped') AS name FROM {}()")
        found |= {
            f"a connection to foreign server {each['name']}" for each in pg.rows(conn, query.format(raw(row["f"])))
        }
    return found


def _foreign_tables(conn: pg.Connection) -> set[str]:
    return {f"foreign table {row['name']} was used" for row in pg.rows(conn, _FOREIGN)}


def _sequences(conn: pg.Connection) -> dict[str, str]:
    """The positions of the sequences that this transaction already used before."""
    found: dict[str, str] = {}
    for row in pg.rows(conn, _USED):
        query = sql.SQL("SELECT last_value || ' ' || is_called AS position FROM {}")
        found[row["name"]] = pg.rows(conn, query.format(raw(row["name"])))[0]["position"]
    return found


_SESSION = """
SELECT 'prepared statement ' || name AS what FROM pg_catalog.pg_prepared_statements
UNION ALL SELECT 'cursor ' || name FROM pg_catalog.pg_cursors
UNION ALL SELECT 'LISTEN ' || c FROM pg_catalog.pg_listening_channels() AS c
"""

_CONNECTIONS = """
SELECT pg_catalog.format('%I.%I', n.nspname, p.proname) AS f
  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
 WHERE p.prosrc LIKE 'postgres_fdw_get_connections%' AND p.probin = '$libdir/postgres_fdw'
   AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE') AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
"""

_NAMES = """
SELECT DISTINCT pg_catalog.format('%%I.%%I', n.nspname, c.relname) AS name, c.relkind::pg_catalog.text AS relkind
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = ANY (%s::pg_catalog.oid[])
 ORDER BY 1
"""

_OWN_LOCKS = """
  FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_class c ON c.oid = l.relation
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE l.pid = pg_catalog.pg_backend_pid() AND l.locktype = 'relation' AND l.granted
   AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
"""

_FOREIGN = (
    "SELECT DISTINCT pg_catalog.format('%I.%I', n.nspname, c.relname) AS name" + _OWN_LOCKS + " AND c.relkind = 'f'"
)

_USED = (
    "SELECT DISTINCT pg_catalog.format('%I.%I', n.nspname, c.relname) AS name"
    + _OWN_LOCKS
    + " AND c.relkind = 'S' AND l.mode = 'RowExclusiveLock'"
)


CHECK = Proof()
