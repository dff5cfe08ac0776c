"""The nouns of the flow, frozen: what desired, live, diff, plan, approve and apply hand to each other.

Everything here is data. JSON is written in one way only, `canonical` (RFC 8785), so that a digest means the same
to everybody.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, TypeAlias, get_args

import rfc8785
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

FORMAT_VERSION = "1.0"
DIGEST_ENCODING = "reconciler/effects/1"

Json: TypeAlias = Any
"""A value of JSON: None, bool, int, float, str, list or dict of the same."""

JsonObject: TypeAlias = dict[str, Any]
"""An object of JSON."""

Number: TypeAlias = Annotated[
    float, PlainSerializer(lambda value: int(value) if value.is_integer() and abs(value) < 2**53 else value)
]
"""A number as canonical JSON has it: 100 and not 100.0."""

Address: TypeAlias = str
"""`<kind>.<name>`, for example `gate.queue.heartbeat.enabled`."""

Action: TypeAlias = Literal["add", "change", "remove", "forget"]

Hazard: TypeAlias = Literal[
    "arms_gate",
    "changes_approvers",
    "changes_owner",
    "changes_policy",
    "forgets",
    "grants_execute",
    "grants_public",
    "moves_from_safe",
    "overwrites_drift",
    "rehomes",
    "replaces_function",
    "retires",
    "security_definer",
]


class Model(BaseModel):
    """Base of every noun: frozen, strict, and no key that is not declared."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)

    def dump(self) -> dict[str, Json]:
        """As JSON types, with the names used in files (aliases)."""
        return self.model_dump(mode="json", by_alias=True)


def canonical(value: Json) -> bytes:
    """Canonical JSON (RFC 8785) of `value`. Raises rfc8785.CanonicalizationError for what JSON cannot hold.

    json's own encoder says the same 20 times as fast (measured), but for integers beyond 15 digits, numbers that it
    writes as `1.0` or with an exponent, and the order of keys with characters from U+E000 on.
    """
    with suppress(ValueError, TypeError, RecursionError):
        text = _encoded(value)
        if _decoded(text) == value and _UNUSUAL.search(text) is None:
            return text.encode()
    return rfc8785.dumps(value)


def _whole(number: str) -> int:
    if len(number) > 15:
        raise ValueError(number)
    return int(number)


def _broken(number: str) -> float:
    # Both write the fewest digits that give the number back; ECMAScript turns to exponents later than Python does.
    if "e" in number or number.endswith(".0"):
        raise ValueError(number)
    return float(number)


_encoded = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_decoded = json.JSONDecoder(parse_int=_whole, parse_float=_broken).decode
_UNUSUAL = re.compile("[^\x00-\ud7ff]")


def digest(value: Json) -> str:
    """SHA-256 over the canonical JSON of `value`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def milliseconds(duration: str) -> int:
    """`800ms`, `60s`, `2m`, `24h`, `7d` as milliseconds. Raises ValueError for anything else."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})(ms|s|m|h|d)", duration)
    if match is None:
        raise ValueError(f"{duration!r} is no duration: write a number and ms, s, m, h or d, for example 800ms or 24h")
    return int(match[1]) * {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}[match[2]]


def _duration(text: str) -> str:
    milliseconds(text)
    return text


Duration: TypeAlias = Annotated[str, AfterValidator(_duration)]
"""A duration as written in a file."""

MOMENT = "%Y-%m-%dT%H:%M:%SZ"
"""RFC 3339 in UTC, to the second; moments in this form are compared as text."""


def _moment(text: str) -> str:
    if datetime.strptime(text, MOMENT).strftime(MOMENT) != text:  # noqa: DTZ007 - Z stands in the form
        raise ValueError(f"{text!r} is no moment such as 2026-05-22T12:00:00Z")
    return text


Moment: TypeAlias = Annotated[str, AfterValidator(_moment)]
"""When something was made or ends."""


# ---------------------------------------------------------------------------------------------------- what is declared


class GateStore(Model):
    """A configuration table that holds gates. `table` is schema-qualified; the others are column names."""

    table: str
    key: str
    value: str
    description: str | None = None
    updated_at: str | None = None


class GateScope(Model):
    """Gates of one store whose key matches."""

    store: str
    matching: str


class FunctionScope(Model):
    """Functions and procedures of one schema whose name matches."""

    schema_name: str = Field(alias="schema")
    matching: str


class MarkerScope(Model):
    """All rows of one table."""

    table: str


class Scope(Model):
    """What is owned: an undeclared object that matches is a finding. Patterns are globs with `*` and `?` only."""

    gates: tuple[GateScope, ...] = ()
    functions: tuple[FunctionScope, ...] = ()
    markers: tuple[MarkerScope, ...] = ()


class ApprovalPolicy(Model):
    """Who must approve, and how. `expires` is a duration such as `24h`.

    for: a higher number for plans with these hazards. approvers: the file, in OpenSSH's allowed_signers format, that
    says who may. break_glass: principals of it whose one approval is enough in an emergency, loudly.
    """

    required: int = Field(default=1, ge=1)
    for_: dict[Hazard, Annotated[int, Field(ge=1)]] = Field(default={}, alias="for")
    signed: bool = True
    expires: Duration = "24h"
    approvers: str | None = None
    break_glass: tuple[str, ...] = ()

    def needed(self, hazards: Collection[str]) -> int:
        """How many approvals a plan with these hazards takes."""
        return max([self.required, *(number for hazard, number in self.for_.items() if hazard in hazards)])


class Tried(Model):
    """A backup that is also tried: what is governed is restored from it into a scratch database and compared."""

    kind: Literal["governed", "full"]
    verify: Literal["restore"]


class Command(Model):
    """The operator's own snapshot: a program with its arguments, no shell."""

    command: tuple[str, ...] = Field(min_length=1)


BackupPolicy: TypeAlias = Literal["none", "governed", "full"] | Tried | Command
"""What is backed up before and after an apply. There is one way to write each, so that none is two policies."""


class ApplyPolicy(Model):
    """How an apply runs. Durations such as `800ms`, `60s`, `2m`, `24h`."""

    search_path: tuple[str, ...] = ("pg_catalog", "public", "pg_temp")
    lock_timeout: Duration = "800ms"
    lock_retries: int = Field(default=5, ge=0, le=100)
    statement_timeout: Duration = "60s"
    max_duration: Duration = "2m"
    backup: BackupPolicy = "none"


class Policy(Model):
    """What the ledger installs and every later apply is judged by."""

    approval: ApprovalPolicy
    apply: ApplyPolicy
    allow_functions: tuple[str, ...] = ()
    allow_not_judged: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where something is declared, counting from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        """`file:line:column`."""
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Declared:
    """One declaration, resolved: the wanted object (`spec`, Absent when it is retired) and the rules of changing it."""

    kind: str
    name: str
    spec: Model
    rules: Model
    place: Place | None = field(default=None, compare=False)

    @property
    def address(self) -> Address:
        """`<kind>.<name>`."""
        return f"{self.kind}.{self.name}"

    def dump(self) -> dict[str, Json]:
        """As kept in plans and in the ledger; the place in the files is not part of it."""
        return {"kind": self.kind, "name": self.name, "spec": self.spec.dump(), "rules": self.rules.dump()}


class Absent(Model):
    """In the place of a spec: the object must not be there, and why. `at`: where it is when its name does not say."""

    retire: str
    at: JsonObject | None = None


@dataclass(frozen=True)
class Check:
    """One declared check (an invariant), resolved."""

    kind: str
    name: str
    spec: Model
    place: Place | None = field(default=None, compare=False)

    @property
    def address(self) -> Address:
        """`<kind>.<name>`."""
        return f"{self.kind}.{self.name}"

    def dump(self) -> dict[str, Json]:
        """As kept in plans and in the ledger."""
        return {"kind": self.kind, "name": self.name, "spec": self.spec.dump()}


@dataclass(frozen=True)
class Desired:
    """Everything the files say, for one target, variables filled in."""

    name: str
    release: str
    target: str
    database: str | None
    """Name of the database the target must be, None when any will do."""
    ledger: str | None
    """Hash of the ledger's first entry, when the files name it."""
    policy: Policy
    approvers: str
    """Who may approve, as the files say it: the text of an allowed_signers file; empty when they name none."""
    scope: Scope
    stores: Mapping[str, GateStore]
    items: Mapping[Address, Declared]
    checks: Mapping[Address, Check]
    source_digest: str
    """SHA-256 over the files as read; informational."""
    remembered: Mapping[Address, Json] = field(default_factory=dict[Address, Json], compare=False)
    """What the ledger remembers of objects whose text the catalog rewrites: see `Kind.learn`."""


# ------------------------------------------------------------------------------------------------------- what is found


class Target(Model):
    """Which database: the target's name in the files, and what the server says it is."""

    name: str
    database: str
    system_identifier: str
    server_version: str


class Finding(Model):
    """Something a person should know that is no change: an undeclared object, a stale marker, a retired name in use."""

    code: Literal["break_glass", "ledger_not_readable", "marker_differs", "mentioned", "stale_heartbeat", "undeclared"]
    address: Address
    message: str


Status: TypeAlias = Literal[
    "held", "violated", "not_judged", "attested", "passed", "failed", "rehearsed", "predicted", "differs", "deferred"
]
"""What a check came to. `attested` is a person's word; `deferred` is judged later, `detail` says when."""


class Verdict(Model):
    """What a check found. `detail` never holds values of rows; the last three are a surface row's."""

    address: Address
    status: Status
    detail: str
    missing: str = ""
    """For not_judged: the privilege that the role lacks."""
    tolerated: bool = False
    """For not_judged: the installed policy lets it stay so."""
    before: str | None = None
    after: str | None = None
    predicted: str | None = None
    group: str = ""
    """The list it belongs to in reports, as its declaration says."""


@dataclass(frozen=True)
class Asked:
    """When and under which policy a check is asked."""

    desired: Desired
    allow_functions: Sequence[str] = ()
    """The installed policy's."""
    inside: bool = False
    """Inside an apply, just before COMMIT; otherwise in plan, drift, or an apply before anything was changed."""
    memo: Json = None
    """Inside: what the check remembered at BEGIN."""
    changes: Sequence[Change] = ()
    """Inside: what the apply changed."""
    attested: Collection[str] = ()
    """Inside: the names that approvers signed for."""
    rehearsed: Mapping[Address, Verdict] = field(default_factory=dict[str, "Verdict"])
    """Inside: what a rehearsal found of the proofs that no apply plays."""


@dataclass(frozen=True)
class Live:
    """One reading of the database: declared objects that exist, facts about them, and what else was found.

    `facts` holds per address what is read beside the object itself (transaction id of the row, results of binds ...).
    """

    items: Mapping[Address, Model]
    facts: Mapping[Address, Mapping[str, Json]]
    findings: tuple[Finding, ...]


class NotCompared(Model):
    """A class of objects inside the declared scope that this version does not compare."""

    object_class: str = Field(alias="class")
    where: str
    count: int


BY_OTHERS = "by others"
"""How the detail of a surface row ends when others wrote meanwhile what it counts."""


def tolerated(verdicts: Sequence[Verdict], policy: Policy) -> tuple[Verdict, ...]:
    """The verdicts, marked where the installed policy lets them stay not judged."""
    return tuple(
        verdict.model_copy(update={"tolerated": True})
        if verdict.status == "not_judged" and verdict.address.partition(".")[2] in policy.allow_not_judged
        else verdict
        for verdict in verdicts
    )


def blocking(verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """The verdicts that forbid an apply. This rule's one place.

    A violated invariant, a failed proof, a surface row that is not as predicted; and what was not judged and is not
    tolerated.
    """
    return tuple(
        verdict
        for verdict in verdicts
        if verdict.status in {"violated", "failed", "differs"}
        or (verdict.status == "not_judged" and not verdict.tolerated)
    )


# --------------------------------------------------------------------------------------------------- what would change


class Statement(Model):
    """One complete SQL statement, as it is sent. `role`: run under SET LOCAL ROLE; None means the apply role."""

    text: str
    role: str | None = None


class FieldChange(Model):
    """One field that differs."""

    name: str
    before: Json = None
    after: Json = None


class Change(Model):
    """One effect.

    Before and after by action:

    ========  =======  ======
    action    before   after
    ========  =======  ======
    add       None     wanted
    change    live     wanted
    remove    live     None
    forget    last     None     nothing is executed; the ledger stops knowing it
    ========  =======  ======

    A replacement is `("remove", "add")` with both. `context` holds what else the statements are derived from.
    """

    address: Address
    kind: str
    actions: tuple[Action, ...]
    before: JsonObject | None = None
    after: JsonObject | None = None
    context: JsonObject | None = None
    fields: tuple[FieldChange, ...] = ()
    reason: str = ""
    hazards: tuple[Hazard, ...] = ()
    statements: tuple[Statement, ...] = ()

    def effect(self) -> dict[str, Json]:
        """The part that an approval signs (DESIGN 6): no rendered SQL, no words for people."""
        return {
            "address": self.address,
            "actions": list(self.actions),
            "before": self.before,
            "after": self.after,
            "context": self.context,
            "hazards": sorted(self.hazards),
        }


class Drift(Model):
    """One object that is not what it was: live (drift) or desired (pending) against last applied."""

    address: Address
    kind: str
    actions: tuple[Action, ...]
    before: JsonObject | None = None
    after: JsonObject | None = None
    fields: tuple[FieldChange, ...] = ()
    reason: str = ""


DriftClass: TypeAlias = Literal[
    "violated",
    "not_judged",
    "moved_pin",
    "drift",
    "both",
    "pending",
    "undeclared",
    "break_glass",
    "stale_heartbeat",
    "marker_differs",
    "mentioned",
    "ledger_not_readable",
    "touched",
]
"""What an item of a report is. `both`: live moved and so did the files. The order is that of reports."""

CLASSES: tuple[DriftClass, ...] = get_args(DriftClass)


class Lock(Model):
    """One lock that an apply takes and keeps until COMMIT. Informative: no digest covers it.

    `on` and `name`: a table; a row of the table of that name, with its `key`; a routine by its identity; a schema; the
    name of what is governed, for the lock that keeps two applies apart. `waits`: whom it keeps waiting, in words.
    """

    address: Address
    mode: str
    on: Literal["table", "row", "routine", "schema", "name"]
    name: str
    key: dict[str, str] = {}
    waits: str

    @property
    def place(self) -> str:
        """What is locked, in words."""
        if self.on == "row":
            return f"row {', '.join(self.key.values())} of {self.name}"
        return f"{self.on} {self.name}"


class Obstacle(Model):
    """Who had something in the way of an apply when its plan was made. Never what they were executing.

    `pid` is 0 for a prepared transaction, None where nobody can tell. `since`: when the transaction began. What the
    role may not see is None. `certain`: an apply would wait; otherwise it might.
    """

    address: Address
    place: str
    holds: str
    certain: bool
    pid: int | None
    role: str | None
    application: str | None
    state: str | None
    since: Moment | None


class Locks(Model):
    """Which locks an apply would take, and who was in the way at that moment.

    `looked`: could this role look who is in the way? `not_seen`: what it, or nobody, could see.
    """

    needed: tuple[Lock, ...]
    looked: bool
    in_the_way: tuple[Obstacle, ...]
    not_seen: tuple[str, ...]


class Need(Model):
    """One thing that must be allowed for an apply. Informative: no digest covers it.

    `on` and `name`: a role (SET: membership with SET in it; USAGE: what it may, as a member that inherits), a schema, a
    table, a function by its schema and name, a sequence, the database, a parameter; `everything` is every table that a
    dump reads. `role`: who needs it; None is the role that applies. `addresses`: what for.
    """

    privilege: str
    on: Literal["role", "schema", "table", "function", "sequence", "database", "parameter", "everything"]
    name: str
    role: str | None = None
    addresses: tuple[Address, ...]

    @property
    def words(self) -> str:
        """What it is, as an error says it."""
        match self.on:
            case "role":
                return f"membership with {'SET' if self.privilege == 'SET' else 'INHERIT'} in role {self.name}"
            case "table":
                what = f"{self.privilege} on {self.name}"
            case "everything":
                what = f"{self.privilege} on {self.name} (pg_read_all_data)"
            case _:
                what = f"{self.privilege} on {self.on} {self.name}"
        return f"{what} for role {self.role}" if self.role is not None else what


class Privileges(Model):
    """What an apply needs, and what of it the role lacked with which the plan was made; often not the one that applies.

    `not_seen`: what nobody can tell beforehand.
    """

    role: str
    needed: tuple[Need, ...]
    missing: tuple[Need, ...]
    not_seen: tuple[str, ...]


class Summary(Model):
    """The numbers of the `Plan:` line."""

    add: int = 0
    change: int = 0
    remove: int = 0
    forget: int = 0
    drift: int = 0
    findings: int = 0


class StateInfo(Model):
    """Which files a plan was made from."""

    name: str
    release: str
    source_digest: str


class Judged(Model):
    """What a check found. `check`: its digest, by which it is known again."""

    check: str
    verdict: Verdict


class Snapshot(Model):
    """The live state as it was read, so that a plan can be made where the database cannot be reached.

    No secret is in it and no answer of a declared query. ledger: `Last.dump`. scopes: what other governance names own
    on the database. seen: what each kind saw, by its name.
    """

    format_version: str = FORMAT_VERSION
    tool: str
    taken_at: Moment
    name: str
    source_digest: str
    target: Target
    ledger: JsonObject
    scopes: JsonObject
    seen: JsonObject
    verdicts: tuple[Judged, ...]
    not_compared: tuple[NotCompared, ...]


class Plan(Model):
    """What would change, complete: an apply reads no state directory again. `desired` is all that is declared."""

    format_version: str = FORMAT_VERSION
    outcome: str
    tool: str
    created_at: Moment
    expires_at: Moment
    state: StateInfo
    target: Target
    setup: tuple[Change, ...]
    changes: tuple[Change, ...]
    drift: tuple[Drift, ...]
    findings: tuple[Finding, ...]
    invariants: tuple[Verdict, ...]
    proofs: tuple[Verdict, ...]
    surface: tuple[Verdict, ...]
    not_compared: tuple[NotCompared, ...]
    locks: Locks | None = None
    """What `reconciler plan` saw of locks; None where nobody looked."""
    privileges: Privileges | None = None
    """What an apply needs, and what `reconciler plan` lacked of it; None where nobody looked."""
    summary: Summary
    effects_digest: str
    effect_digest: str
    desired: JsonObject
    snapshot_of: Moment | None = None
    """When what it was made from was read; None: while it was made."""
    author: str | None = None
    """Who made it, by `author_signature` over `statement`; None: nobody said."""
    author_signature: str | None = None

    def statement(self) -> bytes:
        """What an author signs."""
        return canonical({"author": self.author, "created_at": self.created_at, "effect_digest": self.effect_digest})

    @property
    def hazards(self) -> tuple[Hazard, ...]:
        """Every hazard of every change, sorted; each must be accepted by name."""
        return tuple(sorted({hazard for change in (*self.setup, *self.changes) for hazard in change.hazards}))

    def addresses_with(self, hazard: str) -> list[Address]:
        """The changes that have this hazard."""
        return [change.address for change in (*self.setup, *self.changes) if hazard in change.hazards]

    @property
    def checks(self) -> tuple[Verdict, ...]:
        """Every verdict, of all sorts of checks."""
        return (*self.invariants, *self.proofs, *self.surface)

    @property
    def attestations(self) -> tuple[str, ...]:
        """The names that approvers must sign for, because no query can see what they claim."""
        return tuple(
            sorted(verdict.address.partition(".")[2] for verdict in self.checks if verdict.missing == "attestation")
        )

    @property
    def blocking(self) -> tuple[Verdict, ...]:
        """The checks that forbid an apply: violated, or not judged and not allowed to stay so."""
        return blocking(self.checks)

    @property
    def statements(self) -> tuple[Statement, ...]:
        """Every statement, in the order of an apply."""
        return tuple(statement for change in (*self.setup, *self.changes) for statement in change.statements)

    @property
    def policy(self) -> Policy:
        """What an apply of it goes by: the installed policy, which stands here where the files say another one."""
        policies = [change.before for change in self.setup if change.kind == "policy" and change.before is not None]
        return Policy.model_validate_json(canonical(policies[0] if policies else self.desired["policy"]))

    @property
    def backup(self) -> BackupPolicy:
        """What an apply of it backs up: nothing where nothing but the ledger gets another home."""
        return "none" if any(change.kind == "home" for change in self.setup) else self.policy.apply.backup

    @property
    def has_changes(self) -> bool:
        """Is there something to apply? Setup alone counts: the first apply installs the ledger and the policy."""
        return bool(self.setup or self.changes)


class Identity(Model):
    """Which database: the part of a `Target` that a digest covers."""

    name: str
    database: str
    system_identifier: str


class Listed(Model):
    """The targets of a fleet that one approval is for: the same effects on each, and on no other.

    fleet: its name. effects_digest: of the effects without any target. targets: by name.
    """

    fleet: str
    effects_digest: str
    targets: tuple[Identity, ...] = Field(min_length=1)


class Approval(Model):
    """A person's yes to exactly the effects with this digest, on one target or on those that are `listed`.

    effect_digest: of effects and target; or of effects and the whole list. signature: SSHSIG over `statement`; None for
    an unsigned one. break_glass: alone, in an emergency.
    """

    format_version: str = FORMAT_VERSION
    id: str
    effect_digest: str
    plan_checksum: str
    target: Target | None = None
    listed: Listed | None = None
    approver: str
    reason: str
    accepted: tuple[str, ...]
    attestations: tuple[str, ...] = ()
    issued_at: Moment
    expires_at: Moment
    break_glass: bool = False
    signature: str | None = None

    @model_validator(mode="after")
    def _of_one_sort(self) -> Self:
        if (self.target is None) == (self.listed is None):
            raise ValueError("an approval is for a target, or for a list of them")
        return self

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Json]:
        """Without the one that it has not: what was signed before there were lists keeps its bytes."""
        absent = "listed" if self.listed is None else "target"
        return {key: value for key, value in handler(self).items() if key != absent}

    def statement(self) -> bytes:
        """What is signed: canonical JSON of everything but the signature."""
        return canonical({key: value for key, value in self.dump().items() if key != "signature"})


class Governed(Model):
    """One line of a manifest: an object in its live form after the apply, with its rules; or a check."""

    kind: str
    name: str
    spec: JsonObject
    rules: JsonObject = {}
    facts: JsonObject = {}


class Emergency(Model):
    """An entry that one principal approved alone, told until a normal quorum acknowledges it.

    policy and approvers: as installed before that entry, which may have changed both. What it changed does not decide
    who acknowledges it. hazards: those of its plan.
    """

    entry: int
    recorded_at: str
    approver: str
    reason: str
    hazards: tuple[Hazard, ...]
    policy: ApprovalPolicy
    approvers: str


class Body(Model):
    """What a ledger entry says; its hash covers all of it."""

    format_version: str
    run_id: str
    recorded_at: Moment
    target: Target
    plan: JsonObject
    approvals: tuple[Approval, ...]
    policy: Policy
    approvers: str = ""
    """The installed list: the text of an allowed_signers file."""
    scope: JsonObject
    manifest: dict[Address, Governed]
    checks: tuple[Verdict, ...]
    emergencies: tuple[Emergency, ...] = ()
    """Broken glass that nobody has acknowledged yet, this entry's included."""
    transaction_id: str
    rehomed_at: Moment | None = None
    """When the ledger last got another home: approvals of before are void. None: it never did."""


class Entry(Model):
    """One line of the ledger: what was applied, by which approval, and what was there afterwards."""

    name: str
    number: int
    run_id: str
    recorded_at: str
    previous: str
    hash: str
    body: JsonObject


class Executed(Model):
    """One statement that an apply ran, whole, and how long the server took."""

    address: Address
    text: str
    role: str | None
    seconds: Number


class Stage(Model):
    """One part of an apply, and how long it took. `after` is what followed COMMIT."""

    name: str
    seconds: Number


class Yes(Model):
    """What one approver said."""

    id: str
    approver: str
    reason: str
    accepted: tuple[str, ...]
    attestations: tuple[str, ...]
    issued_at: Moment
    expires_at: Moment
    signed: bool
    break_glass: bool = False


class Step(Model):
    """One thing to do, and the command that does it."""

    what: str
    command: str


class Backup(Model):
    """One backup that was made. `seconds`: with all that was checked.

    file, bytes, sha256: of what lies in the evidence folder; None for the operator's own command, whose exit code and
    last lines stand here instead.
    """

    moment: Literal["before", "after"]
    form: Literal["governed", "full", "command"]
    taken_at: Moment
    seconds: Number
    tool: str
    file: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    exit_code: int | None = None
    said: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    """How it was found to be good, a sentence each."""
    restore: tuple[Step, ...] = ()
    """How to come back by it."""


class Failure(Model):
    """Why an apply did not change anything, as it was told on the terminal."""

    message: str
    details: tuple[str, ...] = ()
    hint: str = ""


class Rehearsal(Model):
    """Where proofs were rehearsed, and for which effects on which schema: what their result is bound to."""

    effect_digest: str
    """The plan's: its effects and checks, on this target."""
    schema_digest: str
    """Of the target's schema, which was copied."""
    server_version: str
    """Of the scratch server."""
    rehearsed_at: Moment


class ProofReport(Model):
    """What every proof came to, on the target or (`rehearsal`) on a scratch database."""

    format_version: str = FORMAT_VERSION
    outcome: str
    target: Target
    seconds: Number
    proofs: tuple[Verdict, ...]
    rehearsal: Rehearsal | None = None


OUTCOME_VERSION = "1.2"


class Outcome(Model):
    """What an apply did. `problems`: what went wrong after COMMIT, when the change itself stands.

    A run that did not end in COMMIT has a `failure`, and neither entry nor hash; then everything here is what it had
    come to, and the server rolled it back (or, for the outcome `unknown`, nobody can say). `started_at` and
    `finished_at` are the server's clock. The verdicts of a failed run may be incomplete, or those of before the change.
    """

    format_version: str = OUTCOME_VERSION
    outcome: str
    tool: str = ""
    run_id: str
    target: Target
    effect_digest: str
    entry: int | None
    hash: str | None
    previous: str | None = None
    genesis: bool
    transaction_id: str | None
    started_at: Moment | None = None
    finished_at: Moment | None = None
    statements: int
    seconds: Number
    stages: tuple[Stage, ...] = ()
    executed: tuple[Executed, ...] = ()
    backups: tuple[Backup, ...] = ()
    approvals: tuple[Yes, ...] = ()
    summary: Summary
    invariants: tuple[Verdict, ...]
    proofs: tuple[Verdict, ...]
    surface: tuple[Verdict, ...]
    surface_later: dict[Address, str] = {}
    """What each row of the surface was when it was read again after COMMIT, on a new connection."""
    findings: tuple[Finding, ...] = ()
    not_compared: tuple[NotCompared, ...] = ()
    failure: Failure | None = None
    problems: tuple[str, ...] = ()

    @property
    def checks(self) -> tuple[Verdict, ...]:
        """Every verdict, of all sorts of checks."""
        return (*self.invariants, *self.proofs, *self.surface)


def glob_match(pattern: str, text: str) -> bool:
    """Does the text match the glob (`*` and `?` only)?"""
    parts = {"*": ".*", "?": "."}
    return re.fullmatch("".join(parts.get(char) or re.escape(char) for char in pattern), text, re.DOTALL) is not None


def glob_regex(pattern: str) -> str:
    """The pattern (`*` and `?` only) as an anchored PostgreSQL regular expression."""
    special = {"*": ".*", "?": "."}
    return "^(?:" + "".join(special.get(char) or re.sub(r"([^\w\s])", r"\\\1", char) for char in pattern) + ")$"
