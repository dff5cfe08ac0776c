"""Memory of the flow: what was last applied, kept in the governed database as an append-only chain; and what the first
apply needs for itself (`setup`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from postgast import split

from reconciler import pg
from reconciler.errors import NotApproved, Refused, ServerProblem
from reconciler.model import Change, Desired, Entry, Finding, Hazard, Json, Policy, Statement, canonical

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VERSION = 1
GENESIS = "0" * 64
"""What the first entry of a chain names as its previous hash."""


@dataclass(frozen=True)
class Last:
    """The ledger as one look found it. `entry` is None when this governance name was never applied here."""

    exists: bool = False
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
    def allow_functions(self) -> tuple[str, ...]:
        """Functions that declared queries may call: the installed policy's, never the proposed one's."""
        return self.policy.allow_functions if self.policy else ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Whether something of the ledger could not be seen."""
        if self.readable:
            return ()
        message = (
            f"role {self.role} may not read the ledger, so what was last applied is not known:"
            f" GRANT USAGE ON SCHEMA reconciler TO {self.role}; GRANT SELECT ON reconciler.entry TO {self.role};"
        )
        return (Finding(code="ledger_not_readable", address="ledger.reconciler", message=message),)


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
    if row["may_read"] is None:
        raise ServerProblem(
            "Schema reconciler exists but has no table entry: it is not a ledger of this program.",
            hint="Rename that schema, or govern another database.",
        )
    if not (row["usage"] and row["may_read"]):
        return Last(exists=True, readable=False, role=row["role"])
    entries = pg.rows(
        conn,
        """
        SELECT name, number, run_id::pg_catalog.text AS run_id, recorded_at::pg_catalog.text AS recorded_at,
               previous, hash, body
          FROM reconciler.entry WHERE name = %s ORDER BY number DESC LIMIT 1
        """,
        (name,),
        doing="reading the ledger",
    )
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
            f"Ledger entry {chain['broken']} of {name} does not follow the one before it: somebody went around the ledger.",
            hint="Find out who changed reconciler.entry before anything is applied.",
        )
    return Last(
        exists=True,
        role=row["role"],
        entry=_entry(entries[0]) if entries else None,
        genesis=chain["genesis"],
        used=frozenset(chain["used"] or ()),
    )


def _entry(row: Mapping[str, Any]) -> Entry:
    if row["hash"] != chained(row["previous"], row["body"]):
        raise Refused(
            f"Ledger entry {row['number']} of {row['name']} does not match its hash: somebody went around the ledger.",
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


def chained(previous: str, body: str) -> str:
    """SHA-256 over the previous hash and the body, as the table's own CHECK computes it."""
    return hashlib.sha256((previous + body).encode()).hexdigest()


def check_named(desired: Desired, found: Last) -> None:
    """Files that name a ledger which is missing or another one are refused, never taken for a first apply.

    So is another target than the ledger's: a physical clone differs from its original in nothing but this name.
    """
    applied = found.entry.body["target"]["name"] if found.entry else desired.target
    if applied != desired.target:
        raise Refused(
            f"This is target {desired.target}, but the ledger of {desired.name} here is that of target {applied}.",
            hint="Check --target and --dsn.",
        )
    if desired.ledger is None or not found.readable or desired.ledger == found.genesis:
        return
    what = f"begins with {found.genesis}" if found.genesis else "does not exist"
    raise Refused(
        f"Target {desired.target} names the ledger {desired.ledger}, but the ledger of {desired.name} here {what}.",
        hint="This is another database, or its ledger was lost; nothing is applied until somebody finds out.",
    )


def setup(desired: Desired, found: Last) -> tuple[Change, ...]:
    """What an apply would install for the tool itself: the ledger, and the policy when it is not the installed one."""
    needed: list[Change] = []
    if not found.exists:
        needed.append(
            Change(
                address="ledger.reconciler",
                kind="ledger",
                actions=("add",),
                after={"version": VERSION},
                reason="the first apply creates the ledger",
                statements=tuple(Statement(text=text) for text in split(source())),
            )
        )
    if not found.readable:
        return tuple(needed)
    before = found.policy.dump() if found.policy else None
    after = desired.policy.dump()
    if before != after:
        hazards: tuple[Hazard, ...] = ("changes_policy",) if before is not None else ()
        needed.append(
            Change(
                address=f"policy.{desired.name}",
                kind="policy",
                actions=("add",) if before is None else ("change",),
                before=before,
                after=after,
                reason="the first policy" if before is None else "differs from the installed policy",
                hazards=hazards,
            )
        )
    return tuple(needed)


def source() -> str:
    """The SQL that creates the ledger, as a DBA could run it beforehand."""
    return files("reconciler").joinpath("ledger.sql").read_text("utf-8")


def append(  # noqa: PLR0913 - one argument per column
    conn: pg.Connection,
    name: str,
    found: Last,
    *,
    run_id: str,
    approval_ids: Sequence[str],
    body: Mapping[str, Json],
) -> Entry:
    """Write the next entry in the caller's transaction. Raises NotApproved for an approval that was used before."""
    previous = found.entry.hash if found.entry else GENESIS
    number = found.entry.number + 1 if found.entry else 1
    text = canonical(body).decode()
    used = sorted(found.used & set(approval_ids))
    if used:
        raise NotApproved(f"Approval {used[0]} was used before; an approval is for one apply.")
    row = pg.rows(
        conn,
        """
        INSERT INTO reconciler.entry (name, number, run_id, approval_ids, body, previous, hash)
        VALUES (%s, %s, %s::pg_catalog.uuid, %s::pg_catalog.uuid[], %s, %s, %s)
        RETURNING name, number, run_id::pg_catalog.text AS run_id, recorded_at::pg_catalog.text AS recorded_at,
                  previous, hash, body
        """,
        (name, number, run_id, list(approval_ids), text, previous, chained(previous, text)),
        doing="writing the ledger entry",
    )[0]
    return _entry(row)
