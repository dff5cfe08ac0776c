"""Beside the flow: what somebody could do to a table, a function or the catalog, as statements. For `violations`.

Each is one facet of a definition, with the ways to change it in order of preference: the first that the server lets
happen is meant. What is granted or handed over goes to a role that is made for it, so that it is never there already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, LiteralString, NamedTuple

from psycopg import sql

from reconciler import pg
from reconciler.parts import raw
from reconciler.violations.samples import guesses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.sql import Composed

    from reconciler.violations.relations import Relation

NAME = "reconciler_violation"
"""What is made is called so."""

ROLE = sql.SQL("CREATE ROLE {}").format(sql.Identifier(NAME))


class Tampering(NamedTuple):
    """One facet changed: in words, and each way to do it as a list of statements."""

    words: str
    ways: tuple[tuple[Composed, ...], ...]


def _one(words: str, *statements: Composed) -> Tampering:
    return Tampering(words, (statements,))


# --------------------------------------------------------------------------------------------------------------- tables


def of_table(conn: pg.Connection, relation: Relation) -> list[Tampering]:
    """Every facet of a table, a view or a foreign table that its definition has."""
    found = [*_columns(relation), *_properties(conn, relation)]
    if relation.kind in {"v", "m"}:
        return [*found, _view(conn, relation), *_grants(conn, relation)]
    return [
        *found,
        *_constraints(conn, relation),
        *_triggers(conn, relation),
        *_security(conn, relation),
        *_indexes(conn, relation),
        *_grants(conn, relation),
    ]


def _alter(relation: Relation, action: LiteralString, *values: sql.Composable) -> Composed:
    return sql.SQL("ALTER TABLE {} ").format(relation.identifier) + sql.SQL(action).format(*values)


def _columns(relation: Relation) -> Iterator[Tampering]:
    names = [(column, sql.Identifier(column.name)) for column in relation.columns]
    new = sql.Identifier(NAME)
    yield _one("a column added", _alter(relation, "ADD COLUMN {} pg_catalog.int4", new))
    yield Tampering(
        "a column dropped",
        tuple((_alter(relation, "DROP COLUMN {} CASCADE", name),) for _, name in reversed(names)),
    )
    yield Tampering(
        "a column renamed", tuple((_alter(relation, "RENAME COLUMN {} TO {}", name, new),) for _, name in names)
    )
    yield Tampering(
        "the type of a column changed",
        tuple(
            (_alter(relation, "ALTER COLUMN {0} TYPE {1} USING {0}::{1}", name, raw(kind)),)
            for kind in ("pg_catalog.text", "pg_catalog.varchar", "pg_catalog.numeric")
            for column, name in names
            if column.type != kind.removeprefix("pg_catalog.") and column.generated is None
        ),
    )
    given = [(column, name) for column, name in names if column.default is not None]
    if given:
        yield Tampering(
            "a default dropped", tuple((_alter(relation, "ALTER COLUMN {} DROP DEFAULT", name),) for _, name in given)
        )
    yield Tampering(
        "a default set",
        tuple(
            (_alter(relation, "ALTER COLUMN {} SET DEFAULT {}", name, guess),)
            for column, name in names
            if column.default is None and column.generated is None
            for guess in guesses(column, ())[:1]
        ),
    )
    bound = [name for column, name in names if column.not_null]
    if bound:
        dropped = tuple((_alter(relation, "ALTER COLUMN {} DROP NOT NULL", name),) for name in bound)
        yield Tampering("a NOT NULL dropped", dropped)
    if len(bound) < len(names):
        free = [name for column, name in names if not column.not_null]
        set_ = tuple((_alter(relation, "ALTER COLUMN {} SET NOT NULL", name),) for name in free)
        yield Tampering("a NOT NULL set", set_)


def _properties(conn: pg.Connection, relation: Relation) -> Iterator[Tampering]:
    role, new = sql.Identifier(NAME), sql.Identifier(relation.schema, NAME)
    yield _one("the owner changed", ROLE, _alter(relation, "OWNER TO {}", role))
    if relation.kind not in {"r", "p"}:
        return
    query = "SELECT relreplident = 'f' AS whole FROM pg_catalog.pg_class WHERE oid = %s"
    if pg.rows(conn, query, (relation.oid,), doing=f"reading {relation.text}")[0]["whole"]:
        yield _one("the replica identity changed", _alter(relation, "REPLICA IDENTITY NOTHING"))
    else:
        yield _one("the replica identity changed", _alter(relation, "REPLICA IDENTITY FULL"))
    yield _one(
        "a rule added",
        sql.SQL("CREATE RULE {} AS ON UPDATE TO {} DO ALSO NOTHING").format(role, relation.identifier),
    )
    if relation.kind == "r":
        query = "SELECT relpersistence = 'u' AS unlogged FROM pg_catalog.pg_class WHERE oid = %s"
        if pg.rows(conn, query, (relation.oid,), doing=f"reading {relation.text}")[0]["unlogged"]:
            yield _one("made logged", _alter(relation, "SET LOGGED"))
        else:
            yield _one("made unlogged", _alter(relation, "SET UNLOGGED"))
        yield _one(
            "a parent given",
            sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING GENERATED)").format(new, relation.identifier),
            _alter(relation, "INHERIT {}", new),
        )


def _view(conn: pg.Connection, relation: Relation) -> Tampering:
    query = "SELECT pg_catalog.rtrim(pg_catalog.pg_get_viewdef(%s::pg_catalog.oid), '; ') AS text"
    text = pg.rows(conn, query, (relation.oid,), doing=f"reading the definition of {relation.text}")[0]["text"]
    same = sql.SQL("CREATE OR REPLACE VIEW {} AS SELECT * FROM ({}) AS q WHERE false").format(
        relation.identifier, raw(text)
    )
    return _one("the query of the view changed", same)


_CONSTRAINTS = """
SELECT k.conname::pg_catalog.text AS name, k.contype::pg_catalog.text AS kind,
       pg_catalog.pg_get_constraintdef(k.oid) AS definition, k.convalidated AS valid,
       pg_catalog.pg_get_expr(k.conbin, k.conrelid) AS expression
  FROM pg_catalog.pg_constraint k WHERE k.conrelid = %s AND k.contype IN ('c', 'f', 'p', 'u', 'x') ORDER BY k.conname
"""


def _constraints(conn: pg.Connection, relation: Relation) -> Iterator[Tampering]:
    new = sql.Identifier(NAME)
    yield _one("a CHECK added", _alter(relation, "ADD CONSTRAINT {} CHECK (1 = 1)", new))
    for row in pg.rows(conn, _CONSTRAINTS, (relation.oid,), doing=f"reading the constraints of {relation.text}"):
        name = sql.Identifier(row["name"])
        drop = _alter(relation, "DROP CONSTRAINT {} CASCADE", name)
        yield _one(f"constraint {row['name']} dropped", drop)
        if row["kind"] == "c":
            wider = _alter(relation, "ADD CONSTRAINT {} CHECK (({}) OR true)", name, raw(row["expression"]))
            yield _one(f"constraint {row['name']} widened, their number as before", drop, wider)
        if row["kind"] in {"c", "f"}:
            definition = row["definition"].removesuffix(" NOT VALID")
            action = " NOT VALID" if row["valid"] else ""
            again = _alter(relation, "ADD CONSTRAINT {} {}", name, raw(definition + action))
            how = "NOT VALID" if row["valid"] else "validated"
            yield _one(f"constraint {row['name']} dropped and added again {how}", drop, again)


_TRIGGERS = """
SELECT t.tgname::pg_catalog.text AS name, t.tgenabled::pg_catalog.text AS enabled, t.tgfoid::pg_catalog.int8 AS function
  FROM pg_catalog.pg_trigger t WHERE t.tgrelid = %s AND NOT t.tgisinternal ORDER BY t.tgname
"""


def _triggers(conn: pg.Connection, relation: Relation) -> Iterator[Tampering]:
    new, function = sql.Identifier(NAME), sql.Identifier(relation.schema, NAME)
    body = sql.SQL("CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'").format(function)
    add = sql.SQL("CREATE TRIGGER {} AFTER INSERT ON {} FOR EACH ROW EXECUTE FUNCTION {}()")
    yield _one("a trigger added", body, add.format(new, relation.identifier, function))
    for row in pg.rows(conn, _TRIGGERS, (relation.oid,), doing=f"reading the triggers of {relation.text}"):
        name = sql.Identifier(row["name"])
        if row["enabled"] == "D":
            yield _one(f"trigger {row['name']} enabled", _alter(relation, "ENABLE TRIGGER {}", name))
        else:
            yield _one(f"trigger {row['name']} disabled", _alter(relation, "DISABLE TRIGGER {}", name))
        drop = sql.SQL("DROP TRIGGER {} ON {}").format(name, relation.identifier)
        yield _one(f"trigger {row['name']} dropped", drop)
        yield from _gutted(conn, row["function"], f"the function of trigger {row['name']} gutted")


_SECURITY = """
SELECT c.relrowsecurity AS enabled, c.relforcerowsecurity AS forced,
       ARRAY(SELECT p.polname::pg_catalog.text FROM pg_catalog.pg_policy p WHERE p.polrelid = c.oid ORDER BY 1)
           AS policies
  FROM pg_catalog.pg_class c WHERE c.oid = %s
"""


def _security(conn: pg.Connection, relation: Relation) -> Iterator[Tampering]:
    (now,) = pg.rows(conn, _SECURITY, (relation.oid,), doing=f"reading the policies of {relation.text}")
    if now["enabled"]:
        yield _one("row security disabled", _alter(relation, "DISABLE ROW LEVEL SECURITY"))
    else:
        yield _one("row security enabled", _alter(relation, "ENABLE ROW LEVEL SECURITY"))
    if now["forced"]:
        yield _one("row security no longer forced", _alter(relation, "NO FORCE ROW LEVEL SECURITY"))
    else:
        yield _one("row security forced", _alter(relation, "FORCE ROW LEVEL SECURITY"))
    create = sql.SQL("CREATE POLICY {} ON {} USING (true)").format(sql.Identifier(NAME), relation.identifier)
    yield _one("a policy added", create)
    for policy in now["policies"]:
        drop = sql.SQL("DROP POLICY {} ON {}").format(sql.Identifier(policy), relation.identifier)
        yield _one(f"policy {policy} dropped", drop)


_INDEXES = """
SELECT c.relname::pg_catalog.text AS name
  FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
 WHERE i.indrelid = %s
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.conindid = i.indexrelid AND k.conrelid = i.indrelid)
 ORDER BY c.relname
"""


def _indexes(conn: pg.Connection, relation: Relation) -> Iterator[Tampering]:
    # Building an index writes to the newest version of the table's row in pg_class, and that is not undone by a
    # rollback; a version of our own is.
    own = sql.SQL(
        "UPDATE pg_catalog.pg_class SET relname = relname"
        " WHERE oid = {0} OR oid IN (SELECT relid FROM pg_catalog.pg_partition_tree({0}::pg_catalog.regclass))"
    ).format(sql.Literal(relation.oid))
    yield Tampering(
        "an index added",
        tuple(
            (own, sql.SQL("CREATE INDEX ON {} ({})").format(relation.identifier, sql.Identifier(column.name)))
            for column in relation.columns
        ),
    )
    for row in pg.rows(conn, _INDEXES, (relation.oid,), doing=f"reading the indexes of {relation.text}"):
        name = sql.Identifier(relation.schema, row["name"])
        yield _one(f"index {row['name']} dropped", sql.SQL("DROP INDEX {}").format(name))


_GRANTS = """
SELECT CASE x.grantee WHEN 0 THEN NULL ELSE pg_catalog.pg_get_userbyid(x.grantee)::pg_catalog.text END AS grantee,
       x.privilege_type AS privilege
  FROM pg_catalog.pg_class c
 CROSS JOIN LATERAL pg_catalog.aclexplode(coalesce(c.relacl, pg_catalog.acldefault('r', c.relowner))) x
 WHERE c.oid = %s AND x.grantor = c.relowner AND x.privilege_type NOT IN ('MAINTAIN', 'SELECT')
 ORDER BY 1 NULLS FIRST, 2
"""


def _grants(conn: pg.Connection, relation: Relation) -> Iterator[Tampering]:
    role = sql.Identifier(NAME)
    for words, what in (
        ("UPDATE granted", sql.SQL("UPDATE")),
        ("SELECT granted", sql.SQL("SELECT")),
        ("UPDATE of a column granted", sql.SQL("UPDATE ({})").format(sql.Identifier(relation.columns[0].name))),
    ):
        yield _one(words, ROLE, sql.SQL("GRANT {} ON {} TO {}").format(what, relation.identifier, role))
    option = sql.SQL("GRANT SELECT ON {} TO {} WITH GRANT OPTION").format(relation.identifier, role)
    yield _one("SELECT granted to be passed on", ROLE, option)
    rows = pg.rows(conn, _GRANTS, (relation.oid,), doing=f"reading the grants of {relation.text}")
    if rows:
        yield Tampering(
            "a grant revoked",
            tuple(
                (
                    sql.SQL("REVOKE {} ON {} FROM {} CASCADE").format(
                        raw(row["privilege"]),
                        relation.identifier,
                        sql.Identifier(row["grantee"]) if row["grantee"] is not None else sql.SQL("PUBLIC"),
                    ),
                )
                for row in rows
            ),
        )


# ------------------------------------------------------------------------------------------------------------ functions


_ROUTINE = """
SELECT p.oid::pg_catalog.int8 AS oid, p.oid::pg_catalog.regprocedure::pg_catalog.text AS identity, p.prosrc AS body,
       p.prokind::pg_catalog.text AS kind, l.lanname::pg_catalog.text AS language, p.prosecdef AS definer,
       p.proisstrict AS strict, p.proleakproof AS leakproof, p.provolatile::pg_catalog.text AS volatility,
       p.proparallel::pg_catalog.text AS parallel, p.procost::pg_catalog.float8 AS cost,
       coalesce(pg_catalog.array_length(p.proconfig, 1), 0) > 0 AS configured,
       CASE WHEN p.prokind IN ('f', 'p', 'w') THEN pg_catalog.pg_get_functiondef(p.oid) END AS definition
  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang
 WHERE p.oid = %s
"""


def of_function(conn: pg.Connection, oid: int) -> list[Tampering]:
    """Every facet of a function or procedure."""
    (now,) = pg.rows(conn, _ROUTINE, (oid,), doing="reading a function")
    routine, role = raw(now["identity"]), sql.Identifier(NAME)

    def alter(action: LiteralString, *values: sql.Composable) -> Composed:
        return sql.SQL("ALTER ROUTINE {} ").format(routine) + sql.SQL(action).format(*values)

    identity: str = now["identity"]
    found = [
        *_gutted(conn, oid, f"{identity}: the body changed"),
        _one(f"{identity}: SECURITY turned", alter("SECURITY INVOKER" if now["definer"] else "SECURITY DEFINER")),
        _one(f"{identity}: a setting added", alter("SET application_name = {}", sql.Literal(NAME))),
        _one(f"{identity}: the owner changed", ROLE, alter("OWNER TO {}", role)),
        _one(
            f"{identity}: EXECUTE granted",
            ROLE,
            sql.SQL("GRANT EXECUTE ON ROUTINE {} TO {}").format(routine, role),
        ),
        _one(f"{identity}: renamed", alter("RENAME TO {}", role)),
        _one(f"{identity}: dropped", sql.SQL("DROP ROUTINE {} CASCADE").format(routine)),
    ]
    if now["configured"]:
        found.append(_one(f"{identity}: its settings taken away", alter("RESET ALL")))
    if now["kind"] == "f":
        volatility: LiteralString = "VOLATILE" if now["volatility"] != "v" else "STABLE"
        found += [
            _one(f"{identity}: the cost changed", alter("COST {}", sql.Literal(now["cost"] + 1))),
            _one(f"{identity}: the volatility changed", alter(volatility)),
            _one(f"{identity}: STRICT turned", alter("CALLED ON NULL INPUT" if now["strict"] else "STRICT")),
            _one(f"{identity}: LEAKPROOF turned", alter("NOT LEAKPROOF" if now["leakproof"] else "LEAKPROOF")),
            _one(
                f"{identity}: PARALLEL changed",
                alter("PARALLEL UNSAFE" if now["parallel"] != "u" else "PARALLEL RESTRICTED"),
            ),
        ]
    return found


def _gutted(conn: pg.Connection, oid: int, words: str) -> Iterator[Tampering]:
    """The same routine with another body: one that does nothing where that can be written, else one byte longer."""
    (now,) = pg.rows(conn, _ROUTINE, (oid,), doing="reading a function")
    body, text = now["body"], now["definition"] or ""
    bodies = ["\nBEGIN\n    RETURN NULL;\nEND\n", "\nBEGIN\nEND\n"] if now["language"] == "plpgsql" else []
    place = text.rfind(body) if body else -1
    if place >= 0:
        yield Tampering(
            words,
            tuple(
                (sql.Composed([raw(text[:place] + other + text[place + len(body) :])]),)
                for other in (*bodies, f"{body}\n")
            ),
        )


def of_functions(conn: pg.Connection, schema: str, pattern: str, glob: str, most: int) -> list[Tampering]:
    """Every facet of the first `most` functions whose names match, and one more of such a name."""
    query = """
        SELECT p.oid::pg_catalog.int8 AS oid FROM pg_catalog.pg_proc p
          JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
         WHERE n.nspname = %s AND p.proname::pg_catalog.text ~ %s
         ORDER BY p.oid::pg_catalog.regprocedure::pg_catalog.text
    """
    found = pg.rows(conn, query, (schema, pattern), doing=f"reading functions of {schema}")
    name = glob.replace("*", "violation").replace("?", "x")
    more = Tampering("one more function", (new_function(schema, name),))
    return [more, *(facet for row in found[:most] for facet in of_function(conn, row["oid"]))]


def new_function(schema: str, name: str) -> tuple[Composed, ...]:
    """A function of this name, whatever others of this name there are."""
    text = sql.SQL("CREATE FUNCTION {}(pg_catalog.line) RETURNS pg_catalog.int4 LANGUAGE sql AS 'SELECT 1'")
    return (text.format(sql.Identifier(schema, name)),)


# ----------------------------------------------------------------------------------------------------------- extensions


def new_extension(name: str) -> tuple[tuple[Composed, ...], ...]:
    """Ways to have an extension: created where its files are there, else written straight into the catalog."""
    row = sql.SQL(
        "INSERT INTO pg_catalog.pg_extension"
        " (oid, extname, extowner, extnamespace, extrelocatable, extversion)"
        " VALUES (4000000000, {}, 10, 11, false, '0')"
    )
    create = sql.SQL("CREATE EXTENSION {} CASCADE")
    return ((create.format(sql.Identifier(name)),), (row.format(sql.Literal(name)),))


def gone_extension(name: str) -> tuple[tuple[Composed, ...], ...]:
    """Ways to lose an extension: dropped with everything that needs it, else taken out of the catalog."""
    row = sql.SQL("DELETE FROM pg_catalog.pg_extension WHERE extname = {}").format(sql.Literal(name))
    return ((sql.SQL("DROP EXTENSION {} CASCADE").format(sql.Identifier(name)),), (row,))
