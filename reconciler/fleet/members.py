"""Second step of a fleet command: Fleet -> its members, those of catalogue databases included, and which are meant."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from psycopg import sql
from pydantic import TypeAdapter, ValidationError

from reconciler import pg
from reconciler.desired import targets
from reconciler.errors import InputError, Problem, ReconcilerError, UsageError
from reconciler.fleet.files import NAME, Canary, Entry, Labels, Member, Query, Source, clash, reach, where
from reconciler.parts import QUERY_TIMEOUT_MS, raw

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reconciler.fleet.files import Fleet

MOST_ROWS = 10_000
MOST_TEXT = 4_096
"""Characters of one column of a catalogue's row."""

CONNECTION = ("dsn", "service", "host", "port", "dbname", "user")
COLUMNS = ("name", *CONNECTION, "labels", "ledger")
"""What a query for targets may give; `name` and something of a connection it must."""


def resolve(fleet: Fleet) -> tuple[Member, ...]:
    """Every member, in the order of the file; those of a query by name.

    Raises InputError with every problem of what the queries gave, and what `pg` raises for a catalogue that cannot be
    asked. Connection strings are never in a message.
    """
    found: list[Member] = []
    problems: list[Problem] = []
    for number, entry in enumerate(fleet.declared.targets):
        if isinstance(entry, Entry):
            dsn = reach(entry.dsn, entry.service)
            found.append(Member(entry.name, dsn, dict(entry.labels), entry.ledger))
            continue
        rows, wrong = _asked(fleet, number, entry)
        problems += wrong
        found += rows
    problems += _twice(fleet, found)
    names = {member.name for member in found}
    for number, wave in enumerate(fleet.declared.waves):
        given = wave.canary if isinstance(wave, Canary) else ()
        problems += [
            fleet.problem(("waves", number, "canary"), f"there is no target {name!r}")
            for name in given
            if isinstance(given, tuple) and name not in names
        ]
    if problems:
        raise InputError(problems)
    if not found:
        raise UsageError(f"The fleet {fleet.name} has no target.")
    return tuple(found)


def choose(members: Sequence[Member], select: Sequence[str], only: Sequence[str]) -> tuple[Member, ...]:
    """The members with all of these labels (`region=eu`) and one of these names. Raises UsageError for nobody."""
    wanted: dict[str, str] = {}
    for text in select:
        label, sign, value = text.partition("=")
        if not sign or not label:
            raise UsageError(f"--select {text}: write label=value, for example region=eu.")
        if wanted.setdefault(label, value) != value:
            raise UsageError(f"--select {label}={wanted[label]} and {label}={value}: no target has both.")
    if missing := sorted(set(only) - {member.name for member in members}):
        raise UsageError(f"There is no target {', '.join(missing)} in the fleet.")
    chosen = tuple(member for member in members if has(member, wanted) and (not only or member.name in only))
    if not chosen:
        raise UsageError("No target of the fleet has these labels.", hint="Look at `labels` in the file of the fleet.")
    return chosen


def has(member: Member, labels: Mapping[str, str]) -> bool:
    """Does the member have all of these labels?"""
    return all(member.labels.get(label) == value for label, value in labels.items())


def _asked(fleet: Fleet, number: int, source: Source) -> tuple[list[Member], list[Problem]]:
    path = ("targets", number, "from", "query")
    try:
        rows = _rows(source.from_)
    except _Unusable as error:
        return [], [fleet.problem(path, str(error), value=True)]
    except ReconcilerError as error:
        raise type(error)(
            f"The targets of entry {number + 1} of {fleet.file} cannot be listed: {error.message}", hint=error.hint
        ) from None
    members: list[Member] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            members.append(_member(row, source.labels))
        except ValueError as error:
            who = row["name"] if re.fullmatch(NAME, row["name"] or "") else "without a usable name"
            problems.append(fleet.problem(path, f"the row {who}: {error}", value=True))
    return sorted(members, key=lambda member: member.name), problems


class _Unusable(Exception):
    """What the query gives is no list of targets."""


def _rows(query: Query) -> list[dict[str, str | None]]:
    """Its rows, every value as text of limited length, in a READ ONLY transaction with a time-out."""
    asked = raw(query.query)
    with pg.connect(reach(query.dsn, query.service), "fleet") as conn, pg.snapshot(conn):
        pg.timeout(conn, QUERY_TIMEOUT_MS)
        doing = "listing targets"
        columns = pg.columns(conn, sql.SQL("SELECT * FROM ({}\n) AS q LIMIT 0").format(asked), doing, quiet=True)
        if unknown := sorted(set(columns) - set(COLUMNS)):
            raise _Unusable(
                f"gives columns that nobody asked for: {', '.join(unknown)}; there are {', '.join(COLUMNS)}"
            )
        if "name" not in columns or len(set(columns)) != len(columns) or not set(columns) & set(CONNECTION):
            raise _Unusable("must give `name`, and `dsn`, `service` or the parts of a connection, each once")
        texts = sql.SQL(", ").join(
            sql.SQL("pg_catalog.left(q.{0}::pg_catalog.text, {1}) AS {0}").format(
                sql.Identifier(column), sql.Literal(MOST_TEXT + 1)
            )
            for column in columns
        )
        whole = sql.SQL("SELECT {} FROM ({}\n) AS q LIMIT {}").format(texts, asked, sql.Literal(MOST_ROWS + 1))
        rows = pg.rows(conn, whole, doing=doing, quiet=True)
    if len(rows) > MOST_ROWS:
        raise _Unusable(f"gives more than {MOST_ROWS} rows")
    if any(len(value or "") > MOST_TEXT for row in rows for value in row.values()):
        raise _Unusable(f"gives a value of more than {MOST_TEXT} characters")
    return rows


def _member(row: Mapping[str, str | None], labels: Mapping[str, str]) -> Member:
    """Raises ValueError, whose words hold nothing of a connection string."""
    name = row["name"] or ""
    if not re.fullmatch(NAME, name):
        raise ValueError("its name is none: letters, digits, `.`, `_` and `-`, at most 63")
    parts = {column: value for column in CONNECTION[1:] if (value := row.get(column))}
    dsn = row.get("dsn")
    if bool(dsn) == bool(parts):
        raise ValueError("it needs a dsn, or a service, or parts of a connection")
    if dsn and pg.place(dsn) is None:
        raise ValueError("its dsn is no connection string")
    ledger = row.get("ledger") or None
    if ledger is not None and not re.fullmatch("[0-9a-f]{64}", ledger):
        raise ValueError("its ledger is no hash")
    own = _labels(row.get("labels"))
    return Member(name, dsn or pg.string(**parts), {**labels, **own}, ledger)


def _labels(text: str | None) -> dict[str, str]:
    try:
        return TypeAdapter(Labels).validate_json(text or "{}", strict=True)
    except ValidationError:
        raise ValueError("its labels are no JSON object of text") from None


def _twice(fleet: Fleet, members: Sequence[Member]) -> list[Problem]:
    """No name twice, no database twice, no name of another target of the state files."""
    taken = targets(fleet.file.parent / fleet.declared.state) - {fleet.declared.target}
    names: set[str] = set()
    places: dict[tuple[str, ...], str] = {}
    problems: list[Problem] = []
    for member in members:
        place = where(member.dsn)
        if member.name in names:
            problems.append(fleet.problem(("targets",), f"there are two targets {member.name!r}"))
        elif place in places:
            message = f"{member.name!r} and {places[place]!r} are one database"
            problems.append(fleet.problem(("targets",), message))
        if member.name in taken:
            problems.append(fleet.problem(("targets",), clash(member.name)))
        names.add(member.name)
        places.setdefault(place, member.name)
    return problems
