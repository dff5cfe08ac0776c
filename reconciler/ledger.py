"""Memory of the flow: what was last applied, kept in the governed database as an append-only chain; and what the first
apply needs for itself (`setup`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, LiteralString

from pydantic import ValidationError

from reconciler import pg, setup
from reconciler.errors import NotApproved, Refused
from reconciler.model import Body, Desired, Emergency, Entry, Finding, Json, JsonObject, Policy, Target, canonical

if TYPE_CHECKING:
    from collections.abc import Mapping

GENESIS = "0" * 64
"""What the first entry of a chain names as its previous hash."""


PLANNED_BY = frozenset({"target", "policy", "approvers", "scope", "manifest", "emergencies", "rehomed_at"})
"""The parts of an entry's body that the next plan depends on."""


@dataclass(frozen=True)
class Last:
    """The ledger as one look found it. `entry` is None when this governance name was never applied here."""

    version: int = 0
    """Of the ledger's schema; 0 when there is none."""
    readable: bool = True
    role: str = ""
    entry: Entry | None = None
    genesis: str | None = None
    used: frozenset[str] = field(default_factory=frozenset[str])

    @property
    def manifest(self) -> Mapping[str, Json]:
        """Address -> what was governed after the last apply; empty when there was none."""
        return self.entry.body["manifest"] if self.entry else {}

    @property
    def policy(self) -> Policy | None:
        """The installed policy."""
        return Policy.model_validate_json(canonical(self.entry.body["policy"])) if self.entry else None

    @property
    def exists(self) -> bool:
        """Is there a ledger, whoever may read it?"""
        return self.version > 0

    @property
    def body(self) -> Body:
        """What the last entry says. Raises Refused where there is none."""
        if self.entry is None:
            raise Refused("There is no ledger entry of this name.")
        return Body.model_validate_json(canonical(self.entry.body))

    @property
    def home(self) -> Target | None:
        """Where the last entry was written."""
        return Target.model_validate_json(canonical(self.entry.body["target"])) if self.entry else None

    @property
    def rehomed_at(self) -> str | None:
        """When it last got another home: approvals that were issued before are void."""
        return self.entry.body.get("rehomed_at") if self.entry else None

    @property
    def approvers(self) -> str:
        """The installed list of approvers: the text of an allowed_signers file."""
        return (self.entry.body.get("approvers") or "") if self.entry else ""

    @property
    def number(self) -> int:
        """Of the last entry; 0 when there is none."""
        return self.entry.number if self.entry else 0

    @property
    def emergencies(self) -> tuple[Emergency, ...]:
        """Broken glass that nobody has acknowledged yet."""
        kept: list[Json] = self.entry.body.get("emergencies", []) if self.entry else []
        return tuple(Emergency.model_validate_json(canonical(one)) for one in kept)

    @property
    def installed(self) -> Mapping[str, Json] | None:
        """The last entry's body: policy, scope and manifest as installed; None when there is none."""
        return self.entry.body if self.entry else None

    @property
    def allow_functions(self) -> tuple[str, ...]:
        """Functions that declared queries may call: the installed policy's, never the proposed one's."""
        return self.policy.allow_functions if self.policy else ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Whether something of the ledger could not be seen."""
        if self.readable:
            return self._broken_glass()
        message = (
            f"role {self.role} may not read the ledger, so what was last applied is not known:"
            f" GRANT USAGE ON SCHEMA reconciler TO {self.role}; GRANT SELECT ON reconciler.entry TO {self.role};"
        )
        return (Finding(code="ledger_not_readable", address="ledger.reconciler", message=message),)

    def dump(self) -> JsonObject:
        """What a plan needs of it, as JSON: not what was planned and approved before, nor which approvals were used."""
        entry = None
        if self.entry is not None:
            entry = self.entry.dump()
            entry["body"] = {name: part for name, part in self.entry.body.items() if name in PLANNED_BY}
        return {"version": self.version, "readable": self.readable, "role": self.role, "entry": entry} | (
            {} if self.genesis is None else {"genesis": self.genesis}
        )

    @classmethod
    def load(cls, dumped: JsonObject) -> Last:
        """The inverse. Raises KeyError, pydantic.ValidationError."""
        entry = dumped["entry"]
        return cls(
            version=dumped["version"],
            readable=dumped["readable"],
            role=dumped["role"],
            entry=None if entry is None else Entry.model_validate_json(canonical(entry)),
            genesis=dumped.get("genesis"),
        )

    def _broken_glass(self) -> tuple[Finding, ...]:
        """An emergency is told until a normal quorum approved an apply after it."""
        if self.entry is None:
            return ()
        return tuple(
            Finding(
                code="break_glass",
                address=f"ledger.{self.entry.name}",
                message=f"entry {one.entry} of {one.recorded_at} was applied by {one.approver} alone,"
                f" breaking the glass: {one.reason}{_beyond(one)}",
            )
            for one in self.emergencies
        )


def _beyond(emergency: Emergency) -> str:
    changed = [name for name in ("changes_approvers", "changes_policy") if name in emergency.hazards]
    if not changed:
        return ""
    return f"; it changed who decides ({', '.join(changed)}), and only the approvers from before it can acknowledge it"


def last(conn: pg.Connection, name: str) -> Last:
    """What was last applied under this governance name. Raises ServerProblem for a schema that is not our ledger."""
    found = pg.rows(
        conn,
        """
        SELECT current_user::pg_catalog.text AS role,
               (SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE')) AS usage,
               (SELECT pg_catalog.has_table_privilege(c.oid, 'SELECT') FROM pg_catalog.pg_class c
                 WHERE c.relnamespace = n.oid AND c.relname = 'entry' AND c.relkind = 'r') AS may_read
          FROM pg_catalog.pg_namespace n WHERE n.nspname = 'reconciler'
        """,
        doing="looking for the ledger",
    )
    if not found:
        return Last()
    row = found[0]
    version = check_shape(conn)
    if not (row["usage"] and row["may_read"]):
        return Last(version=version, readable=False, role=row["role"])
    entries = pg.rows(conn, _ENTRY + " WHERE name = %s ORDER BY number DESC LIMIT 1", (name,), "reading the ledger")
    chain = pg.rows(
        conn,
        """
        SELECT (SELECT hash FROM reconciler.entry WHERE name = %(name)s AND number = 1) AS genesis,
               (SELECT pg_catalog.array_agg(DISTINCT a.id::pg_catalog.text)
                  FROM reconciler.entry e CROSS JOIN LATERAL pg_catalog.unnest(e.approval_ids) AS a (id)) AS used,
               (SELECT min(e.number) FROM reconciler.entry e
                 WHERE e.name = %(name)s
                   AND e.previous IS DISTINCT FROM
                       CASE e.number WHEN 1 THEN pg_catalog.repeat('0', 64)
                            ELSE (SELECT p.hash FROM reconciler.entry p
                                   WHERE p.name = e.name AND p.number = e.number - 1) END) AS broken
        """,
        {"name": name},
        doing="reading the ledger",
    )[0]
    if chain["broken"] is not None:
        raise Refused(
            f"Ledger entry {chain['broken']} of {name} does not follow the one before it:"
            " somebody went around the ledger.",
            hint="Find out who changed reconciler.entry before anything is applied.",
        )
    return Last(
        version=version,
        role=row["role"],
        entry=_entry(entries[0]) if entries else None,
        genesis=chain["genesis"],
        used=frozenset(chain["used"] or ()),
    )


def scopes(conn: pg.Connection, name: str) -> dict[str, Json]:
    """What every other governance name owns on this database, by name."""
    rows = pg.rows(
        conn,
        """
        SELECT DISTINCT ON (e.name) e.name, e.body::pg_catalog.jsonb -> 'scope' AS scope
          FROM reconciler.entry e WHERE e.name <> %s ORDER BY e.name, e.number DESC
        """,
        (name,),
        doing="reading the scopes of other names",
    )
    return {row["name"]: row["scope"] for row in rows}


def check_apart(desired: Desired, others: Mapping[str, Json]) -> None:
    """No other name owns what these files own. Pure. Raises Refused, naming every overlap."""
    ours = setup.scope(desired)
    found = [f"{name}: {what}" for name, theirs in others.items() for what in setup.overlaps(ours, theirs)]
    if found:
        raise Refused(
            f"The scope of {desired.name} overlaps with what another name governs on this database.",
            details=found,
            hint="An object belongs to one name: make the scopes narrower.",
        )


def of_run(conn: pg.Connection, name: str, run_id: str) -> Entry | None:
    """The entry that this run wrote, None when it wrote none. Raises Refused for one that was changed."""
    rows = pg.rows(
        conn, _ENTRY + " WHERE name = %s AND run_id = %s::pg_catalog.uuid", (name, run_id), "looking for the run"
    )
    return _entry(rows[0]) if rows else None


def numbered(conn: pg.Connection, name: str, number: int) -> Entry | None:
    """The entry with this number, None when there is none. Raises Refused for one that was changed."""
    rows = pg.rows(conn, _ENTRY + " WHERE name = %s AND number = %s", (name, number), "reading the ledger")
    return _entry(rows[0]) if rows else None


def chain(conn: pg.Connection, name: str) -> list[dict[str, Any]]:
    """Every entry of this name by number, as it stands there: nothing is believed and nothing refused."""
    return pg.rows(conn, _ENTRY + " WHERE name = %s ORDER BY number", (name,), "reading the ledger")


_ENTRY: LiteralString = """
SELECT name, number, run_id::pg_catalog.text AS run_id, recorded_at::pg_catalog.text AS recorded_at,
       approval_ids::pg_catalog.text[] AS approval_ids, previous, hash, body
  FROM reconciler.entry"""


def _entry(row: Mapping[str, Any]) -> Entry:
    """The row as an entry. Raises Refused for one that this program cannot have written."""
    if row["hash"] != chained(row["previous"], row["body"]):
        raise Refused(
            f"Ledger entry {row['number']} of {row['name']} does not match its hash: somebody went around the ledger.",
            hint="Find out who changed reconciler.entry before anything is applied.",
        )
    try:
        body = Body.model_validate_json(row["body"])
    except ValidationError as error:
        raise Refused(
            f"Ledger entry {row['number']} of {row['name']} is not one that reconciler wrote:"
            f" {'.'.join(str(part) for part in error.errors()[0]['loc']) or 'it is no JSON object'}.",
            hint="Find out who wrote to reconciler.entry before anything is applied.",
        ) from None
    # The columns beside the body are for queries; what counts is what the hash covers.
    if (body.run_id, sorted(approval.id for approval in body.approvals)) != (
        row["run_id"],
        sorted(row["approval_ids"]),
    ):
        raise Refused(
            f"Ledger entry {row['number']} of {row['name']} does not have the ids of its body:"
            " somebody went around the ledger.",
            hint="Find out who changed reconciler.entry before anything is applied.",
        )
    if not _same_moment(row["recorded_at"], body.recorded_at):
        raise Refused(
            f"Ledger entry {row['number']} of {row['name']} does not have the time of its body:"
            " somebody went around the ledger.",
            hint="Find out who changed reconciler.entry before anything is applied.",
        )
    return Entry(
        name=row["name"],
        number=row["number"],
        run_id=row["run_id"],
        recorded_at=row["recorded_at"],
        previous=row["previous"],
        hash=row["hash"],
        body=json.loads(row["body"]),
    )


def _same_moment(column: str, written: str) -> bool:
    """Is the column, as the server prints it, the moment of the body?"""
    try:
        return datetime.fromisoformat(column) == datetime.fromisoformat(written)
    except ValueError:
        return False  # infinity, or a year that Python does not know


def check_shape(conn: pg.Connection, *, written_by_us: bool = False) -> int:
    """Is schema reconciler the ledger that this program creates, with nothing added that could act on its own?

    Returns its version. written_by_us: an apply is about to write to it, so it must also belong to somebody whose code
    this role may run: a superuser, the owner of the database, a role it is a member of, or one that nobody can be,
    because it cannot log in and only superusers are members. Raises Refused.
    """
    row = pg.rows(conn, _SHAPE, doing="looking at the ledger")[0]
    version = next((number for number, fires in _FIRES.items() if row["triggers"] == _triggers(fires)), None)
    wrong = [
        sentence
        for is_wrong, sentence in (
            (row["columns"] != _COLUMNS, "its columns are not those of a ledger"),
            (row["constraints"] != _CONSTRAINTS, "its constraints are not those of a ledger"),
            (version is None, "its triggers are not those of a ledger"),
            (row["code"] != [_CODE], "its trigger function is not ours"),
            (bool(row["others"]), "it has rules, policies, child tables or indexes that compute something"),
            (row["logged"] is False, "it is unlogged, so a crash would empty it"),
            (
                written_by_us and bool(row["strangers"]),
                f"it belongs to {', '.join(row['strangers'] or ())}, whose code this role should not run",
            ),
        )
        if is_wrong
    ]
    if wrong:
        raise Refused(
            "Schema reconciler exists, but it is not the ledger of this program.",
            details=wrong,
            hint="Find out who made it: somebody else, or a newer reconciler. Where it is nobody's ledger, drop it.",
        )
    return version or 0


def chained(previous: str, body: str) -> str:
    """SHA-256 over the previous hash and the body, as the table's own CHECK computes it."""
    return hashlib.sha256((previous + body).encode()).hexdigest()


def check_named(desired: Desired, found: Last, target: Target) -> None:
    """Files that name a ledger which is missing or another one are refused, never taken for a first apply.

    So is a ledger that was written somewhere else: a physical clone differs from its original in nothing but the name
    of the target; after an upgrade or a restore it is another server. `rehome` says that this is meant.
    """
    check_genesis(desired, found)
    home = found.home
    if home is None or lives(home) == lives(target):
        return
    if home.name != target.name:
        message = f"This is target {target.name}, but the ledger of {desired.name} here is that of target {home.name}."
    else:
        message = (
            f"The ledger of {desired.name} was written on database {home.database} of system {home.system_identifier},"
            f" but this is database {target.database} of system {target.system_identifier}."
        )
    raise Refused(
        message,
        hint="Check --target and --dsn. After a clone, an upgrade or a restore:"
        f" reconciler rehome -t {target.name} --out FILE",
    )


def lives(target: Target) -> tuple[str, str, str]:
    """What a home is known by: the name of the target, the database, the server's system identifier."""
    return target.name, target.database, target.system_identifier


def check_genesis(desired: Desired, found: Last) -> None:
    """Is it the ledger that the files name, if they name one? Raises Refused."""
    if desired.ledger is None or not found.readable or desired.ledger == found.genesis:
        return
    what = f"begins with {found.genesis}" if found.genesis else "does not exist"
    raise Refused(
        f"Target {desired.target} names the ledger {desired.ledger}, but the ledger of {desired.name} here {what}.",
        hint="This is another database, or its ledger was lost; nothing is applied until somebody finds out.",
    )


def append(conn: pg.Connection, name: str, found: Last, body: Body) -> Entry:
    """Write the next entry in the caller's transaction. Raises NotApproved for an approval that was used before."""
    previous = found.entry.hash if found.entry else GENESIS
    number = found.entry.number + 1 if found.entry else 1
    text = canonical(body.dump()).decode()
    ids = [approval.id for approval in body.approvals]
    used = sorted(found.used & set(ids))
    if used:
        raise NotApproved(f"Approval {used[0]} was used before; an approval is for one apply.")
    row = pg.rows(
        conn,
        """
        INSERT INTO reconciler.entry (name, number, run_id, recorded_at, approval_ids, body, previous, hash)
        VALUES (%s, %s, %s::pg_catalog.uuid, %s::pg_catalog.timestamptz, %s::pg_catalog.uuid[], %s, %s, %s)
        RETURNING name, number, run_id::pg_catalog.text AS run_id, recorded_at::pg_catalog.text AS recorded_at,
                  approval_ids::pg_catalog.text[] AS approval_ids, previous, hash, body
        """,
        (name, number, body.run_id, body.recorded_at, ids, text, previous, chained(previous, text)),
        doing="writing the ledger entry",
    )[0]
    return _entry(row)


_COLUMNS = [
    "name text not null",
    "number bigint not null",
    "run_id uuid not null",
    "recorded_at timestamp with time zone not null",
    "approval_ids uuid[] not null",
    "body text not null",
    "previous text not null",
    "hash text not null",
]
_CONSTRAINTS = [
    "entry_hash_check: CHECK ((hash = encode(sha256(convert_to((previous || body), 'UTF8'::name)), 'hex'::text)))",
    "entry_hash_key: UNIQUE (hash)",
    "entry_number_check: CHECK ((number >= 1))",
    "entry_pkey: PRIMARY KEY (name, number)",
    "entry_previous_check: CHECK ((previous ~ '^[0-9a-f]{64}$'::text))",
    "entry_run_id_key: UNIQUE (run_id)",
]
_CODE = {
    "body": setup.source().split("$function$")[1],
    "config": ["search_path=pg_catalog, pg_temp"],
    "definer": False,
    "language": "plpgsql",
}
"""Of the trigger function: everything that says what it does."""
_FIRES = {1: "O", 2: "A"}
"""By the version of the ledger: when its triggers fire, as pg_trigger.tgenabled says it; `A` is always."""


def _triggers(fires: str) -> list[str]:
    return [
        f"{fires} CREATE TRIGGER entry_is_append_only_{name} BEFORE {events} ON reconciler.entry"
        f" FOR EACH {name.upper()} EXECUTE FUNCTION reconciler.entry_is_append_only()"
        for name, events in (("row", "INSERT OR DELETE OR UPDATE"), ("statement", "TRUNCATE"))
    ]


_SHAPE = """
SELECT (SELECT pg_catalog.array_agg(
                   pg_catalog.format('%s %s%s', a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod),
                                     CASE WHEN a.attnotnull THEN ' not null' ELSE '' END) ORDER BY a.attnum)
          FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
       (SELECT pg_catalog.array_agg(pg_catalog.format('%s: %s', k.conname, pg_catalog.pg_get_constraintdef(k.oid))
                                    ORDER BY k.conname)
          FROM pg_catalog.pg_constraint k
         WHERE k.conrelid = c.oid AND k.contype <> 'n' AND k.convalidated) AS constraints,
       (SELECT pg_catalog.array_agg(pg_catalog.format('%s %s', t.tgenabled, pg_catalog.pg_get_triggerdef(t.oid))
                                    ORDER BY t.tgname)
          FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal) AS triggers,
       (SELECT pg_catalog.jsonb_agg(DISTINCT pg_catalog.jsonb_build_object(
                   'body', p.prosrc, 'config', p.proconfig, 'definer', p.prosecdef, 'language', l.lanname))
          FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
          JOIN pg_catalog.pg_language l ON l.oid = p.prolang
         WHERE t.tgrelid = c.oid AND NOT t.tgisinternal) AS code,
       EXISTS (SELECT FROM pg_catalog.pg_rewrite r WHERE r.ev_class = c.oid)
           OR EXISTS (SELECT FROM pg_catalog.pg_policy y WHERE y.polrelid = c.oid)
           OR EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent))
           -- What an index computes, or decides by, is code that an insert runs.
           OR EXISTS (SELECT FROM pg_catalog.pg_index x
                       WHERE x.indrelid = c.oid AND (x.indexprs IS NOT NULL OR x.indpred IS NOT NULL)) AS others,
       c.relpersistence = 'p' AS logged,
       -- Of the table, of the function that it runs, of the schema that both could be dropped from and made anew in.
       (SELECT pg_catalog.array_agg(o.rolname::pg_catalog.text ORDER BY o.rolname) FROM pg_catalog.pg_roles o
         WHERE (o.oid = c.relowner
                OR o.oid IN (SELECT n.nspowner FROM pg_catalog.pg_namespace n WHERE n.oid = c.relnamespace)
                OR o.oid IN (SELECT p.proowner
                               FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_trigger t ON t.tgfoid = p.oid
                              WHERE t.tgrelid = c.oid AND NOT t.tgisinternal))
           AND NOT (
               o.rolsuper
               -- A superuser is a member of everything; that says nothing about whose code it should run.
               OR (SELECT NOT me.rolsuper FROM pg_catalog.pg_roles me WHERE me.rolname = current_user)
                  AND pg_catalog.pg_has_role(o.oid, 'MEMBER')
               OR NOT o.rolcanlogin
                  AND NOT EXISTS (SELECT FROM pg_catalog.pg_auth_members m
                                    JOIN pg_catalog.pg_roles r ON r.oid = m.member AND NOT r.rolsuper
                                   WHERE m.roleid = o.oid)
               OR o.oid = (SELECT d.datdba FROM pg_catalog.pg_database d
                            WHERE d.datname = pg_catalog.current_database()))) AS strangers
  FROM (SELECT 1) AS one
  LEFT JOIN pg_catalog.pg_class c ON c.relname = 'entry' AND c.relkind = 'r'
        AND c.relnamespace = (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = 'reconciler')
"""
