"""Check `proof`: what the system does and refuses, shown on made-up rows in a savepoint that is always rolled back."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import psycopg
from postgast import pg_query_pb2 as pb
from postgast import unwrap_node, walk
from psycopg import sql
from pydantic import Field, model_validator

from reconciler import pg, transitions
from reconciler.allowlist import AGGREGATES, FUNCTIONS, WINDOWS, check_query
from reconciler.checks import CheckKind
from reconciler.errors import Locked, ServerProblem
from reconciler.model import Asked, Check, Declared, Duration, GateStore, Json, Model, Verdict, canonical, milliseconds
from reconciler.parts import QUERY_TIMEOUT_MS, Complaint, Context, identifier, raw, relation, single_value, unreadable
from reconciler.syntax import Trouble, at, single, strings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

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


class Step(Model):
    """`given` and `arm` prepare, `when` is the statement on trial, `then` is what it must come to."""

    given: tuple[str, ...] = ()
    arm: dict[str, str | None] = {}
    holder: tuple[str, ...] = ()
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
    """A proof of several steps. Each goes on where the one before ended."""

    reason: str = Field(min_length=1)
    requires: tuple[Precondition, ...] = ()
    advances: tuple[str, ...] = ()
    sessions: Literal[1] = 1
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
    "select_stmt insert_stmt update_stmt delete_stmt merge_stmt call_stmt create_table_as_stmt constraints_set_stmt".split()
)
"""What `given`, `holder` and `when` may be. All of it is undone by ROLLBACK TO SAVEPOINT."""

VOLATILE = frozenset(
    """
    clock_timestamp current_setting currval format gen_random_uuid lastval lpad nextval pg_backend_pid
    pg_current_xact_id pg_sleep pg_try_advisory_xact_lock random repeat rpad set_config setval timeofday uuidv4 uuidv7
    """.split()
)
"""Functions of pg_catalog that a proof may call beside those of the allowlist. What sequences keep is detected later."""

ESCAPING = ("dblink", "lo_", "pg_", "set_config")
"""Names that are refused where the grammar hides a call: after a dot, and in every schema for dblink."""


def statement_troubles(text: str) -> list[Trouble]:
    """What is wrong with a statement of a proof: it must be one, undone by a rollback, and call nothing that is not."""
    statement, troubles = single(text)
    if statement is None:
        return troubles
    kind = statement.node.WhichOneof("node") or ""
    if kind not in STATEMENTS:
        word = text.encode()[statement.start :].decode().split(maxsplit=1)[0].upper()
        message = f"{word} is not allowed in a proof: only SELECT, INSERT, UPDATE, DELETE, MERGE, VALUES, CALL,"
        return [at(text, statement.start, f"{message} CREATE TEMP TABLE AS and SET CONSTRAINTS")]
    return [at(text, place, message) for place, message in _escapes(statement)]


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
    seen: set[int] = set()
    for _, message in walk(tree):
        node = unwrap_node(message) if isinstance(message, pb.Node) else message
        if id(node) not in seen:
            seen.add(id(node))
            yield node


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
        if isinstance(declaration, SteppedProof):
            steps = {("steps", number): step for number, step in enumerate(declaration.steps)}
        else:
            assert isinstance(declaration, SingleProof)
            only = declaration.model_dump(by_alias=True, exclude={"reason", "requires", "advances", "sessions"})
            steps = {(): Step.model_validate_json(canonical(only))}
        spec = ProofSpec(
            reason=declaration.reason,
            requires=declaration.requires,
            advances=declaration.advances,
            sessions=declaration.sessions,
            steps=tuple(steps.values()),
            stores=_stores(steps.values(), context, items),
        )
        for path, text, what in _texts(spec, tuple(steps)):
            troubles = (
                check_query(text, context.policy.allow_functions).troubles
                if what == "query"
                else statement_troubles(text)
            )
            problems += [Complaint(path, trouble.message) for trouble in troubles]
        problems += _complaints(declaration, steps, spec)
        return (None if problems else spec), problems

    def load(self, spec: Json) -> Model:
        """A resolved proof from JSON types."""
        return ProofSpec.model_validate_json(canonical(spec))

    def run(self, conn: pg.Connection, check: Check, asked: Asked) -> Verdict:
        """Play it, when asked inside an apply."""
        spec = check.spec
        assert isinstance(spec, ProofSpec)
        if spec.sessions == 2:
            detail = "needs a rehearsal: reconciler prove --rehearse"
            return Verdict(address=check.address, status="deferred", detail=detail)
        if not asked.inside:
            return Verdict(address=check.address, status="deferred", detail="runs inside the apply")
        return _in_savepoint(conn, check, spec, asked)


def _stores(steps: Sequence[Step] | Any, context: Context, items: Mapping[str, Declared]) -> dict[str, GateStore]:
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
        for key, texts in (("given", step.given), ("holder", step.holder)):
            for number, text in enumerate(texts):
                yield (*path, key, number), text, "statement"
        yield (*path, "when"), step.when, "statement"
        for number, one in enumerate(step.then):
            if one.query is not None:
                yield (*path, "then", number, "query"), one.query, "query"


def _complaints(
    declaration: SingleProof | SteppedProof, steps: Mapping[Any, Step], spec: ProofSpec
) -> Iterator[Complaint]:
    for path, step in steps.items():
        for gate in step.arm:
            if gate not in spec.stores:
                yield Complaint((*path, "arm", gate), f"gate {gate!r} is not declared; only declared gates can be armed")
        if spec.sessions == 1:
            for key in ("holder", "within"):
                if getattr(step, key):
                    yield Complaint((*path, key), f"`{key}` needs `sessions: 2`")
        elif not step.holder:
            yield Complaint(("sessions",), "`sessions: 2` needs `holder`: what the other session does and keeps open")
    for number, text in enumerate(declaration.advances):
        try:
            relation(text)
        except ValueError as error:
            yield Complaint(("advances", number), str(error))


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


@dataclass(frozen=True)
class _Stage:
    """Where a proof plays."""

    conn: pg.Connection
    path: sql.Composable
    timeout_ms: int
    transaction: str
    where: str = ""

    def at(self, where: str) -> _Stage:
        """The same stage, at another place of the proof."""
        return replace(self, where=where)


@dataclass(frozen=True)
class _Came:
    """What a statement came to: rows, or the error that it raised."""

    rows: list[dict[str, Json]]
    single: bool = False
    """One row with one column of JSON."""
    error: psycopg.Error | None = None


def _in_savepoint(conn: pg.Connection, check: Check, spec: ProofSpec, asked: Asked) -> Verdict:
    """Play the proof, undo it, and look for what the undoing did not reach."""
    before = _outliving(conn, set())
    pg.run(conn, "SAVEPOINT reconciler_proof")
    status, detail, missing, foreign = "passed", "", "", set[str]()
    try:
        stage = _stage(conn, asked)
        _allowed(spec, asked)
        _required(conn, spec, asked)
        for number, step in enumerate(spec.steps, 1):
            _step(stage.at(f"step {number}" if len(spec.steps) > 1 else ""), step, spec)
        # A deferred constraint never fires in what is rolled back.
        stage.at("the end").send("SET CONSTRAINTS ALL IMMEDIATE")
        foreign = _foreign_tables(conn)
        expectations = sum(len(step.then) for step in spec.steps)
        detail = f"{_count(len(spec.steps), 'step')}, {_count(expectations, 'expectation')}"
    except _Failed as failure:
        status, detail = "failed", str(failure)
    except _NotJudged as obstacle:
        status, (missing, detail) = "not_judged", obstacle.args
    pg.run(conn, "ROLLBACK TO SAVEPOINT reconciler_proof")
    pg.run(conn, "RELEASE SAVEPOINT reconciler_proof")
    escaped = sorted({*_escaped(conn, before, spec.advances), *foreign})
    if escaped:
        status, detail = "failed", f"escaped the rollback: {', '.join(escaped)}" + (f"; {detail}" if detail else "")
    return Verdict(address=check.address, status=cast("Any", status), detail=detail, missing=missing)
