"""What `pin` invariants compare: the definition of a table or of functions as lines, a fact each, from one transaction.

A line is made only of what the object is, never of an oid, so that the same definition gives the same lines in any
database and on any supported major.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, LiteralString

from reconciler import pg
from reconciler.parts import relation
from reconciler.syntax import quote_ident

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reconciler.pg import Connection


def of_table(conn: Connection, name: str) -> list[str] | None:
    """Every fact of a table: columns, constraints with validity, indexes, triggers with state and the bodies of their
    functions, rules, policies, owner, every grant. None when there is no such relation.
    """
    schema, relname = relation(name)
    found = pg.rows(conn, _TABLE, (schema, relname), doing=f"reading the definition of {name}")
    if not found:
        return None
    table = found[0]
    traits = (
        f"{_KINDS[table['relkind']]} owner {table['owner']}",
        "unlogged" if table["relpersistence"] == "u" else "",
        "row security" if table["relrowsecurity"] else "",
        "forced" if table["relforcerowsecurity"] else "",
        f"replica identity {table['relreplident']}",
    )
    lines = [", ".join(trait for trait in traits if trait)]
    queries: tuple[LiteralString, ...] = (_COLUMNS, _CONSTRAINTS, _INDEXES, _REST)
    for query in queries:
        rows = pg.rows(conn, query, {"oid": table["oid"]}, doing=f"reading the definition of {name}")
        lines += [row["line"] for row in rows]
    triggers = pg.rows(conn, _TRIGGERS, {"oid": table["oid"]}, doing=f"reading the triggers of {name}")
    return [*lines, *(_trigger(row) for row in triggers)]


def of_schema(conn: Connection) -> str:
    """SHA-256 of everything that the schemas of this database define, our own and PostgreSQL's left out.

    Two databases that were made alike have the same digest. Values are no part of it: neither rows nor positions of
    sequences.
    """
    schemas = [row["name"] for row in pg.rows(conn, _SCHEMAS, doing="reading the schema")]
    lines = [line for schema in schemas for line in of_functions(conn, schema, "")]
    found = pg.rows(conn, _SCHEMA, (schemas,), doing="reading the schema")
    lines += [f"{row['line']} sha256:{_sha256(row['body'])}" for row in found]
    # Sorted here, not by the server, whose collation is its own.
    return _sha256("\n".join(sorted(lines)))


def reading(role: str) -> str:
    """How each line begins that says that this role may read a table, or columns of it, and may not pass that on."""
    return f"grant to {role if role == 'PUBLIC' else quote_ident(role)}: SELECT "


def of_functions(conn: Connection, schema: str, pattern: str) -> list[str]:
    """A line for each function or procedure of a schema whose name matches the regular expression, sorted by identity.

    It names every attribute; the body stands as its SHA-256.
    """
    rows = pg.rows(conn, _FUNCTIONS, (schema, pattern), doing=f"reading functions of {schema}")
    return [f"function {row['identity']} {_function(row)}" for row in rows]


def _function(row: Mapping[str, Any]) -> str:
    return f"{row['attributes']} body sha256:{_sha256(row['body'])}"


def _sha256(text: str | None) -> str:
    return hashlib.sha256((text or "").encode()).hexdigest()


def _trigger(row: Mapping[str, Any]) -> str:
    return f"trigger {row['state']} {row['definition']} calls {row['identity']} {_function(row)}"


_KINDS = {"r": "table", "p": "partitioned table", "v": "view", "m": "materialized view", "f": "foreign table"}

_TABLE = """
SELECT c.oid::pg_catalog.int8 AS oid, c.relkind::pg_catalog.text AS relkind,
       c.relpersistence::pg_catalog.text AS relpersistence,
       c.relrowsecurity, c.relforcerowsecurity, c.relreplident::pg_catalog.text AS relreplident,
       pg_catalog.pg_get_userbyid(c.relowner)::pg_catalog.text AS owner
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
"""

_COLUMNS = """
SELECT pg_catalog.concat_ws(' ', 'column', pg_catalog.quote_ident(a.attname),
           pg_catalog.format_type(a.atttypid, a.atttypmod),
           CASE WHEN a.attcollation <> t.typcollation THEN 'collate ' || (SELECT pg_catalog.quote_ident(l.collname)
                FROM pg_catalog.pg_collation l WHERE l.oid = a.attcollation) END,
           CASE WHEN a.attnotnull THEN 'not null' END,
           CASE a.attidentity WHEN 'a' THEN 'identity always' WHEN 'd' THEN 'identity by default' END,
           CASE a.attgenerated WHEN '' THEN 'default' ELSE 'generated' END || ' '
               || pg_catalog.pg_get_expr(d.adbin, d.adrelid)
       ) AS line
  FROM pg_catalog.pg_attribute a
  JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum
"""

# NOT NULL is a constraint of its own since 18 and a property of the column before: it stands with the column.
_CONSTRAINTS = """
SELECT 'constraint ' || pg_catalog.quote_ident(k.conname) || ' ' || pg_catalog.pg_get_constraintdef(k.oid)
       || CASE WHEN k.convalidated THEN '' ELSE ' (not validated)' END
       || CASE WHEN k.condeferrable THEN ' (deferrable)' ELSE '' END
       || CASE WHEN k.connoinherit AND k.contype = 'c' THEN ' (no inherit)' ELSE '' END AS line
  FROM pg_catalog.pg_constraint k
 WHERE k.conrelid = %(oid)s AND k.contype IN ('c', 'f', 'p', 'u', 'x')
 ORDER BY k.conname
"""

_INDEXES = """
SELECT 'index ' || pg_catalog.pg_get_indexdef(i.indexrelid)
       || CASE WHEN i.indisvalid THEN '' ELSE ' (invalid)' END
       || CASE WHEN i.indisreplident THEN ' (replica identity)' ELSE '' END AS line
  FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
 WHERE i.indrelid = %(oid)s ORDER BY c.relname
"""

_REST = """
SELECT line FROM (
    SELECT 1 AS part, 'rule ' || w.ev_enabled::pg_catalog.text || ' ' || pg_catalog.pg_get_ruledef(w.oid) AS line
      FROM pg_catalog.pg_rewrite w WHERE w.ev_class = %(oid)s
    UNION ALL
    SELECT 2, pg_catalog.concat_ws(' ', 'policy', pg_catalog.quote_ident(p.polname), p.polcmd::pg_catalog.text,
                CASE WHEN p.polpermissive THEN 'permissive' ELSE 'restrictive' END,
                (SELECT pg_catalog.string_agg(
                            CASE x WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.pg_get_userbyid(x)::pg_catalog.text END,
                            ', ' ORDER BY 1) FROM pg_catalog.unnest(p.polroles) AS x),
                'using', pg_catalog.pg_get_expr(p.polqual, p.polrelid),
                'check', pg_catalog.pg_get_expr(p.polwithcheck, p.polrelid))
      FROM pg_catalog.pg_policy p WHERE p.polrelid = %(oid)s
    UNION ALL
    SELECT 3, 'inherits ' || h.inhparent::pg_catalog.regclass::pg_catalog.text
      FROM pg_catalog.pg_inherits h WHERE h.inhrelid = %(oid)s
    UNION ALL
    SELECT 4, pg_catalog.concat_ws(' ', CASE WHEN x.is_grantable THEN 'grantable' ELSE 'grant' END, 'to',
                CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(x.grantee))
                END || ':', x.privilege_type, x.place, 'by',
                pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(x.grantor)))
      FROM (SELECT c.relowner, NULL AS place, (pg_catalog.aclexplode(
                       coalesce(c.relacl, pg_catalog.acldefault('r', c.relowner)))).*
              FROM pg_catalog.pg_class c WHERE c.oid = %(oid)s
            UNION ALL
            SELECT c.relowner, '(' || pg_catalog.quote_ident(a.attname) || ')', (pg_catalog.aclexplode(a.attacl)).*
              FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
             WHERE a.attrelid = %(oid)s AND NOT a.attisdropped) AS x
     -- MAINTAIN came with 17; an owner's own rights by default are not worth a difference between majors.
     WHERE x.privilege_type <> 'MAINTAIN' OR x.grantee <> x.relowner
) AS facts ORDER BY part, line COLLATE "C"
"""

_ROUTINE = """
       pg_catalog.concat_ws(' ',
           CASE p.prokind WHEN 'p' THEN 'procedure' WHEN 'w' THEN 'window' WHEN 'a' THEN 'aggregate'
                          ELSE 'function' END,
           'returns ' || CASE WHEN p.proretset THEN 'setof ' ELSE '' END || pg_catalog.format_type(p.prorettype, NULL),
           'language ' || l.lanname, 'volatility ' || p.provolatile::pg_catalog.text,
           CASE WHEN p.prosecdef THEN 'security definer' END, CASE WHEN p.proisstrict THEN 'strict' END,
           CASE WHEN p.proleakproof THEN 'leakproof' END, 'parallel ' || p.proparallel::pg_catalog.text,
           'cost ' || p.procost::pg_catalog.text, 'rows ' || p.prorows::pg_catalog.text,
           'arguments (' || pg_catalog.pg_get_function_arguments(p.oid) || ')',
           'set ' || pg_catalog.array_to_string(p.proconfig, '; '),
           'owner ' || pg_catalog.pg_get_userbyid(p.proowner)::pg_catalog.text,
           'execute ' || (SELECT pg_catalog.string_agg(g.line, ', ' ORDER BY g.line COLLATE "C")
                            FROM (SELECT CASE x.grantee WHEN 0 THEN 'PUBLIC'
                                              ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(x.grantee)) END
                                         || CASE WHEN x.is_grantable THEN ' grantable' ELSE '' END || ' by '
                                         || pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(x.grantor)) AS line
                                    FROM pg_catalog.aclexplode(
                                             coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) x) g)
       ) AS attributes,
       p.prosrc || coalesce(pg_catalog.pg_get_function_sqlbody(p.oid), '') AS body,
       p.oid::pg_catalog.regprocedure::pg_catalog.text AS identity
"""

_TRIGGERS = (
    """
SELECT CASE t.tgenabled WHEN 'O' THEN 'enabled' WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'replica'
                        ELSE 'always' END AS state,
       pg_catalog.pg_get_triggerdef(t.oid) AS definition,
"""
    + _ROUTINE
    + """
  FROM pg_catalog.pg_trigger t
  JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
  JOIN pg_catalog.pg_language l ON l.oid = p.prolang
 WHERE t.tgrelid = %(oid)s AND NOT t.tgisinternal
 ORDER BY t.tgname
"""
)

_FUNCTIONS = (
    "SELECT"
    + _ROUTINE
    + """
  FROM pg_catalog.pg_proc p
  JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
  JOIN pg_catalog.pg_language l ON l.oid = p.prolang
 WHERE n.nspname = %s AND p.proname::pg_catalog.text ~ %s
 ORDER BY p.oid::pg_catalog.regprocedure::pg_catalog.text COLLATE "C"
"""
)

_SCHEMAS = """
SELECT nspname::pg_catalog.text AS name FROM pg_catalog.pg_namespace
 WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'reconciler') ORDER BY 1
"""

_SCHEMA = """
SELECT q.line, q.body FROM (
WITH n AS (
    SELECT oid, nspname::pg_catalog.text AS name, nspowner, nspacl FROM pg_catalog.pg_namespace
     WHERE nspname = ANY (%s::pg_catalog.name[])
), members AS (
    SELECT d.classid, d.objid FROM pg_catalog.pg_depend d
     WHERE d.deptype = 'e' AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass
), c AS (
    SELECT r.*, pg_catalog.format('%%I.%%I', n.name, r.relname) AS name
      FROM pg_catalog.pg_class r JOIN n ON n.oid = r.relnamespace
     WHERE NOT EXISTS (SELECT FROM members m
                        WHERE m.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND m.objid = r.oid)
)
SELECT pg_catalog.concat_ws(' ', 'schema', n.name, pg_catalog.pg_get_userbyid(n.nspowner), n.nspacl) AS line,
       NULL AS body
  FROM n
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'extension', e.extname, e.extversion), NULL FROM pg_catalog.pg_extension e
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'relation', c.name, c.relkind::pg_catalog.text, c.relpersistence::pg_catalog.text,
           pg_catalog.pg_get_userbyid(c.relowner), c.relacl, c.reloptions, c.relrowsecurity, c.relforcerowsecurity,
           c.relreplident::pg_catalog.text, pg_catalog.pg_get_expr(c.relpartbound, c.oid)), NULL
  FROM c WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'c')
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'column', c.name, a.attnum, a.attname,
           pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::pg_catalog.text,
           a.attgenerated::pg_catalog.text, a.attcollation = t.typcollation,
           pg_catalog.pg_get_expr(d.adbin, d.adrelid), a.attacl), NULL
  FROM c JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
  JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'c')
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'inherits', c.name, h.inhparent::pg_catalog.regclass), NULL
  FROM c JOIN pg_catalog.pg_inherits h ON h.inhrelid = c.oid
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'constraint', c.name, k.conname, k.convalidated, k.condeferrable),
       pg_catalog.pg_get_constraintdef(k.oid)
  FROM c JOIN pg_catalog.pg_constraint k ON k.conrelid = c.oid
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'index', c.name, i.indisvalid), pg_catalog.pg_get_indexdef(i.indexrelid)
  FROM c JOIN pg_catalog.pg_index i ON i.indrelid = c.oid
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'trigger', c.name, t.tgenabled::pg_catalog.text), pg_catalog.pg_get_triggerdef(t.oid)
  FROM c JOIN pg_catalog.pg_trigger t ON t.tgrelid = c.oid WHERE NOT t.tgisinternal
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'rule', c.name, w.ev_enabled::pg_catalog.text), pg_catalog.pg_get_ruledef(w.oid)
  FROM c JOIN pg_catalog.pg_rewrite w ON w.ev_class = c.oid
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'policy', c.name, p.polname, p.polcmd::pg_catalog.text, p.polpermissive,
           (SELECT pg_catalog.array_agg(pg_catalog.pg_get_userbyid(x) ORDER BY 1)
              FROM pg_catalog.unnest(p.polroles) AS x)),
       pg_catalog.concat_ws(' check ', pg_catalog.pg_get_expr(p.polqual, p.polrelid),
                            pg_catalog.pg_get_expr(p.polwithcheck, p.polrelid))
  FROM c JOIN pg_catalog.pg_policy p ON p.polrelid = c.oid
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'type', n.name, t.typname, t.typtype::pg_catalog.text,
           pg_catalog.pg_get_userbyid(t.typowner), t.typacl, t.typnotnull, t.typdefault,
           CASE WHEN t.typbasetype <> 0 THEN pg_catalog.format_type(t.typbasetype, t.typtypmod) END,
           (SELECT pg_catalog.array_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_catalog.pg_enum e
             WHERE e.enumtypid = t.oid)),
       (SELECT pg_catalog.string_agg(pg_catalog.pg_get_constraintdef(k.oid), ' ' ORDER BY k.conname)
          FROM pg_catalog.pg_constraint k WHERE k.contypid = t.oid)
  FROM pg_catalog.pg_type t JOIN n ON n.oid = t.typnamespace
 WHERE t.typtype IN ('d', 'e', 'r')
   AND NOT EXISTS (SELECT FROM members m
                    WHERE m.classid = 'pg_catalog.pg_type'::pg_catalog.regclass AND m.objid = t.oid)
UNION ALL
SELECT pg_catalog.concat_ws(' ', 'event trigger', e.evtname, e.evtevent, e.evtenabled::pg_catalog.text, e.evttags,
           e.evtfoid::pg_catalog.regprocedure), NULL
  FROM pg_catalog.pg_event_trigger e
) AS q
"""
