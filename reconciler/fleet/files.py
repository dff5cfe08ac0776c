"""First step of a fleet command: fleet.yaml -> Fleet, offline, or every problem of the file at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, TypeAlias, cast

from pydantic import Field

from reconciler import desired, pg
from reconciler.allowlist import check_query
from reconciler.errors import InputError, Problem
from reconciler.model import Desired, Json, Model
from reconciler.survey import taken
from reconciler.yamltext import Document, parse, read_text, validate

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""Of a target: it is also a name of files."""

MOST_WORKERS = 64

Name: TypeAlias = Annotated[str, Field(pattern=NAME)]
Labels: TypeAlias = dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")], str]


class Query(Model):
    """Where targets are listed in a database: one SELECT on it."""

    dsn: str | None = None
    service: str | None = None
    query: str = Field(min_length=1)


class Entry(Model):
    """One target. `ledger`: the hash of its ledger's first entry, once it has one."""

    name: Name
    dsn: str | None = None
    service: str | None = None
    labels: Labels = {}
    ledger: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


class Source(Model):
    """Many targets, from a catalogue database. `labels`: added to those that a row gives."""

    from_: Query = Field(alias="from")
    labels: Labels = {}


class Canary(Model):
    """The first wave: targets by name, or by their labels."""

    canary: tuple[str, ...] | dict[str, str]


class Percent(Model):
    """A wave after which so many percent of the fleet are done, rounded up."""

    percent: int = Field(ge=1, le=100)


class Declaration(Model):
    """The section `fleet`, the only one of its file. `state`: relative to the file."""

    version: int = Field(ge=1, le=1)
    name: str = Field(pattern="^[a-z][a-z0-9_-]{0,39}$")
    state: str = Field(min_length=1)
    target: str
    targets: tuple[Entry | Source, ...]
    waves: tuple[Canary | Percent, ...] = ()
    workers: int = Field(default=4, ge=1, le=MOST_WORKERS)
    schedule: str | None = Field(default=None, pattern=r"^\S+( \S+){4,5}$")


@dataclass(frozen=True)
class Member:
    """One target of the fleet: its name, and how to reach it. The connection string may hold a password."""

    name: str
    dsn: str = field(repr=False)
    labels: Mapping[str, str]
    ledger: str | None = None


@dataclass(frozen=True)
class Fleet:
    """The file, read and judged. `sources`: in the place of members that only a catalogue database knows.

    settings: what the state files say for the target whose settings the members take.
    """

    file: Path
    declared: Declaration
    document: Document
    settings: Desired

    @property
    def name(self) -> str:
        """The fleet's."""
        return self.declared.name

    def problem(self, path: tuple[str | int, ...], message: str, *, value: bool = False) -> Problem:
        """Something wrong with a place of the file, below `fleet`."""
        return self.document.problem(str(self.file), ("fleet", *path), message, value=value)

    def of(self, member: Member) -> Desired:
        """The declarations for one member: the settings of the template, under the member's own name.

        A ledger of its own is named by the member, never by the template.
        """
        own = self.settings.ledger if member.name == self.settings.target else None
        return replace(self.settings, target=member.name, ledger=member.ledger or own)


def load(file: Path) -> Fleet:
    """The fleet of a file, and what its state files say. Raises InputError with every problem, UsageError."""
    text, problems = read_text(file, file.parent)
    if text is None:
        raise InputError(problems)
    document, problems = parse(text, str(file))
    if document is None:
        raise InputError(problems)
    top = cast("dict[str, Json]", document.data)
    problems += [
        document.problem(
            str(file), (key,), f"unknown section {key!r}; the file of a fleet has `fleet` and nothing else"
        )
        for key in top
        if key != "fleet"
    ]
    if "fleet" not in top:
        raise InputError([*problems, Problem(str(file), 1, 1, "the file has no section `fleet`")])
    declared, found = validate(Declaration, document, ("fleet",), top["fleet"], str(file))
    problems += found
    if declared is None:
        raise InputError(_in_order(problems))

    def at(path: tuple[str | int, ...], message: str) -> Problem:
        return document.problem(str(file), ("fleet", *path), message, value=True)

    problems += [at(path, message) for path, message in (*_targets(declared), *_waves(declared))]
    directory = file.parent / declared.state
    known: frozenset[str] = frozenset()
    settings: Desired | None = None
    try:
        settings = desired.load(directory, declared.target)
        known = desired.targets(directory)
    except InputError as error:
        problems += error.problems
    taken_names = known - {declared.target}
    problems += [
        at(("targets", number, "name"), clash(entry.name))
        for number, entry in enumerate(declared.targets)
        if isinstance(entry, Entry) and entry.name in taken_names
    ]
    if problems or settings is None:
        raise InputError(_in_order(problems))
    return Fleet(file, declared, document, taken(settings))


def _in_order(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda one: (one.file, one.line or 0, one.column or 0, one.message))


def clash(name: str) -> str:
    """Why a member may not have the name of another target of the state files."""
    return f"{name!r} is a target of the state files with settings of its own: give the one in the fleet another name"


def where(dsn: str) -> tuple[str, ...]:
    """What two connection strings to one database have in common, as far as text can tell; the user is not in it."""
    parts = pg.place(dsn) or {}
    host = parts.get("hostaddr") or parts.get("host", "")
    port = parts.get("port", "" if "service" in parts else "5432")
    return (parts.get("service", ""), host.lower(), port, parts.get("dbname") or parts.get("user", ""))


def reach(dsn: str | None, service: str | None) -> str:
    """The connection string of an entry that has one of the two."""
    return dsn if dsn is not None else pg.string(service=service or "")


_Found = tuple[tuple[str | int, ...], str]


def _targets(declared: Declaration) -> list[_Found]:
    found: list[_Found] = [] if declared.targets else [(("targets",), "lists nobody")]
    names: dict[str, int] = {}
    places: dict[tuple[str, ...], str] = {}
    for number, entry in enumerate(declared.targets):
        path: tuple[str | int, ...] = ("targets", number)
        given, below = (entry, path) if isinstance(entry, Entry) else (entry.from_, (*path, "from"))
        found += [(below + more, message) for more, message in _connection(given.dsn, given.service)]
        if isinstance(entry, Source):
            troubles = check_query(entry.from_.query).troubles
            found += [((*below, "query"), trouble.message) for trouble in troubles]
            continue
        if entry.name in names:
            found.append(((*path, "name"), f"{entry.name!r} is already the name of entry {names[entry.name] + 1}"))
        names.setdefault(entry.name, number)
        if (entry.dsn is None) != (entry.service is None):
            place = where(reach(entry.dsn, entry.service))
            if place in places:
                found.append((path, f"this is the database of {places[place]!r}"))
            places.setdefault(place, entry.name)
    return found


def _connection(dsn: str | None, service: str | None) -> list[_Found]:
    if (dsn is None) == (service is None):
        return [((), "needs `dsn` or `service`, and not both")]
    parts = {} if dsn is None else pg.place(dsn)
    if parts is None:
        return [(("dsn",), "is no connection string")]
    if parts.keys() & pg.SECRETS:
        return [(("dsn",), "holds a password: that belongs into ~/.pgpass or a service file")]
    return []


def _waves(declared: Declaration) -> list[_Found]:
    found: list[_Found] = []
    names = {entry.name for entry in declared.targets if isinstance(entry, Entry)}
    open_ended = any(isinstance(entry, Source) for entry in declared.targets)
    before = 0
    for number, wave in enumerate(declared.waves):
        path: tuple[str | int, ...] = ("waves", number)
        if isinstance(wave, Percent):
            if wave.percent <= before:
                found.append(((*path, "percent"), f"must be more than the {before} before it: it counts those as well"))
            before = max(before, wave.percent)
            continue
        if before:
            found.append((path, "a canary goes before every percent"))
        if not wave.canary:
            found.append(((*path, "canary"), "names nobody"))
        if isinstance(wave.canary, tuple) and not open_ended:
            found += [
                ((*path, "canary", index), f"there is no target {name!r}")
                for index, name in enumerate(wave.canary)
                if name not in names
            ]
    if declared.waves and before != 100:
        found.append(
            (("waves", len(declared.waves) - 1), "the last wave must be `percent: 100`, or nobody ever gets the rest")
        )
    return found
