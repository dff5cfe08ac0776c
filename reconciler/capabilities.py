"""Before an apply takes a lock: what its role needs for this plan and lacks, all of it at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import sql

from reconciler import pg
from reconciler.errors import MissingPrivilege
from reconciler.parts import relation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reconciler.model import Plan, Target


def check(conn: pg.Connection, plan: Plan, target: Target, *, ledger_exists: bool) -> None:
    """What the apply role needs and lacks, all of it at once. Raises MissingPrivilege."""
    option = "SET" if conn.info.server_version >= 160_000 else "MEMBER"
    role = pg.rows(conn, "SELECT current_user::pg_catalog.text AS role")[0]["role"]
    lacking: list[str] = []

    def ask(query: sql.SQL | sql.Composed, params: Sequence[Any], missing: str) -> None:
        # NULL: the object is not there yet; then this plan creates it, or executing says so.
        if pg.rows(conn, query, params)[0]["may"] is False and missing not in lacking:
            lacking.append(missing)

    for statement_role in sorted({statement.role for statement in plan.statements if statement.role}):
        ask(
            sql.SQL("SELECT pg_catalog.pg_has_role(%s::pg_catalog.name, %s) AS may"),
            (statement_role, option),
            f"membership with SET in role {statement_role}",
        )
    for change in plan.changes:
        after = change.after or {}
        if change.kind == "function" and "add" in change.actions:
            ask(
                sql.SQL(
                    "SELECT (SELECT pg_catalog.has_schema_privilege(%s::pg_catalog.name, n.oid, 'CREATE')"
                    " FROM pg_catalog.pg_namespace n WHERE n.nspname = %s) AS may"
                ),
                (after["owner"], after["schema_name"]),
                f"CREATE on schema {after['schema_name']} for role {after['owner']}",
            )
        if change.kind in {"gate", "marker"} and "forget" not in change.actions:
            rules = plan.desired["items"][change.address]["rules"]
            if rules.get("via") and after:
                continue
            verb = "INSERT" if change.before is None else "UPDATE" if after else "DELETE"
            table: str = (after or change.before or {})["table"]
            ask(
                sql.SQL(
                    "SELECT (SELECT pg_catalog.{}(c.oid, %s) FROM pg_catalog.pg_class c"
                    " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
                    " WHERE n.nspname = %s AND c.relname = %s) AS may"
                ).format(sql.SQL("has_table_privilege" if verb == "DELETE" else "has_any_column_privilege")),
                (verb, *relation(table)),
                f"{verb} on {table}",
            )
    if ledger_exists:
        ask(
            sql.SQL("SELECT pg_catalog.has_table_privilege('reconciler.entry', 'INSERT') AS may"),
            (),
            "INSERT on reconciler.entry",
        )
    else:
        ask(
            sql.SQL("SELECT pg_catalog.has_database_privilege(%s, 'CREATE') AS may"),
            (target.database,),
            f"CREATE on database {target.database} (for the ledger)",
        )
    if lacking:
        raise MissingPrivilege(
            f"Role {role} lacks {lacking[0]}."
            if len(lacking) == 1
            else f"Role {role} lacks {len(lacking)} privileges.",
            details=lacking if len(lacking) > 1 else (),
            hint="Nothing was changed. Grant them, or apply as a role that has them.",
        )
