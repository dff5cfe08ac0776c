"""Beside the flow: are the checks worth anything? Faults are planted on a rehearsal, and a proof has to notice each.

Never on a target. A proof that passes with a fault planted says nothing about it; an invariant that nothing can violate
says nothing at all.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from reconciler import pg
from reconciler.checks.invariant import CHECK as INVARIANT
from reconciler.checks.proof import CHECK as PROOF
from reconciler.checks.proof import ProofSpec
from reconciler.checks.proof import rehearse as with_two_sessions
from reconciler.desired import sources
from reconciler.errors import InputError, ReconcilerError, ServerProblem
from reconciler.model import FORMAT_VERSION, Asked, Check, Desired, Model, Target, milliseconds
from reconciler.mutants import MUTATORS, Mutant, mutants
from reconciler.rehearsal import prepared
from reconciler.sql import split_identity
from reconciler.violations import Violation, synthesise
from reconciler.yamltext import parse, read_text, validate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from reconciler.rehearsal import Rehearsed


class Equivalent(Model):
    """A mutant that behaves as the original does. `because`: how that is known."""

    routine: str
    fault: str
    because: str


class EquivalentFile(Model):
    """Mutants that no proof can kill, by their ids."""

    equivalent: dict[str, Equivalent]


class Tally(Model):
    """How many faults of one kind were planted, and what became of them. `refused`: PostgreSQL would not take them."""

    planted: int
    killed: int
    refused: int
    equivalent: int
    survived: int


class Survivor(Model):
    """A fault that no proof noticed. `because`: why it is known to make no difference; empty when it is not."""

    id: str
    place: str
    mutator: str
    before: str
    after: str
    because: str = ""


class MutationReport(Model):
    """What became of every fault. `unparsed`: routines without mutants, and why. `idle`: proofs that killed nothing."""

    format_version: str = FORMAT_VERSION
    outcome: str
    target: Target
    server_version: str
    seconds: float
    mutants: dict[str, Tally]
    survivors: tuple[Survivor, ...]
    killers: dict[str, int]
    idle: tuple[str, ...]
    unparsed: dict[str, str]
    unknown: tuple[str, ...]
    """Ids of the file of equivalents that name no mutant any more."""
    invariants: tuple[Violation, ...] = ()
    """What came of violating each invariant."""


class Told(Protocol):
    """Told how far it is: faults tried, of how many, survivors so far."""

    def __call__(self, done: int, of: int, survivors: int) -> None:
        """Called after each fault."""
        ...


def mutate(  # noqa: PLR0913 - what a rehearsal needs, and what is said about its survivors
    dsn: str | None,
    state: Path,
    desired: Desired,
    told: Told,
    *,
    equivalent: Path | None = None,
    scratch: str | None = None,
    allow_untested: bool = False,
) -> MutationReport:
    """Plant every fault in every declared function, one at a time, and play the proofs until one fails.

    Then make a violation of every invariant.

    state: the directory that `desired` was loaded from. equivalent: a file of mutants known to make no difference.
    Raises what a rehearsal raises; ServerProblem when a proof fails before any fault was planted.
    """
    started = time.monotonic()
    known = _known(equivalent)
    planted, places, unparsed = _planted(state)
    with prepared(dsn, desired, scratch=scratch, allow_untested=allow_untested) as copy:
        trial = _Trial.of(copy, desired)
        left, fates = _one_session(trial, planted, told)
        left = _two_sessions(trial, left, fates, told)
        violations = _violations(trial, desired)
    survivors = tuple(
        Survivor(
            id=each.id,
            place=f"{places[each.routine]}:{each.line}",
            mutator=each.mutator,
            before=each.before,
            after=each.after,
            because=known[each.id].because if each.id in known else "",
        )
        for each in left
    )
    bad = [each for each in survivors if not each.because]
    blind = [each for each in violations if each.status in {"unseen", "vacuous"}]
    killers = Counter(fate for fate in fates.values() if fate)
    return MutationReport(
        outcome="proof_failed" if bad else "violated" if blind else "no_changes",
        target=copy.target,
        server_version=copy.rehearsal.server_version,
        seconds=round(time.monotonic() - started, 1),
        mutants=_tallies(planted, fates, {each.id: bool(each.because) for each in survivors}),
        survivors=survivors,
        killers=dict(killers.most_common()),
        idle=tuple(check.address for check in trial.proofs if check.address not in killers),
        unparsed=unparsed,
        unknown=tuple(sorted(set(known) - {each.id for each in planted})),
        invariants=violations,
    )


def _violations(trial: _Trial, desired: Desired) -> tuple[Violation, ...]:
    """Every invariant with a violation made for it."""
    with pg.connect(trial.copy.dsn, "prove") as conn:
        return tuple(
            synthesise(conn, check, Asked(desired, trial.copy.allow_functions, inside=True))
            for check in desired.checks.values()
            if check.kind == INVARIANT.name
        )


def exit_code(found: MutationReport) -> int:
    """3 when a fault that is not known to make no difference, or a violation, went unnoticed; else 0."""
    return 0 if found.outcome == "no_changes" else 3


def _known(path: Path | None) -> Mapping[str, Equivalent]:
    """The file of equivalents. Raises InputError."""
    if path is None:
        return {}
    text, problems = read_text(path, path.parent)
    document = None
    if text is not None:
        document, problems = parse(text, str(path))
    if document is not None and not problems:
        found, problems = validate(EquivalentFile, document, (), document.data, str(path))
        if found is not None:
            return found.equivalent
    raise InputError(problems)


def _planted(state: Path) -> tuple[list[Mutant], dict[str, str], dict[str, str]]:
    """Every mutant of every declared function; the file of each function; and those that have none, with the reason."""
    planted: list[Mutant] = []
    places: dict[str, str] = {}
    unparsed: dict[str, str] = {}
    for name, path in sources(state).items():
        text, problems = read_text(path, state)
        if text is None:
            raise InputError(problems)
        places[name] = str(path)
        try:
            planted += mutants(name, text)
        except ValueError as error:
            unparsed[name] = str(error)
    return planted, places, unparsed


def _tallies(
    planted: Sequence[Mutant], fates: Mapping[str, str | None], survivors: Mapping[str, bool]
) -> dict[str, Tally]:
    found: dict[str, Tally] = {}
    for mutator in MUTATORS:
        ids = [each.id for each in planted if each.mutator == mutator]
        if ids:
            refused = sum(fates.get(one) == "" for one in ids)
            known = sum(survivors.get(one) is True for one in ids)
            alive = sum(survivors.get(one) is False for one in ids)
            found[mutator] = Tally(
                planted=len(ids),
                killed=len(ids) - refused - known - alive,
                refused=refused,
                equivalent=known,
                survived=alive,
            )
    return found


# ----------------------------------------------------------------------------------------------------------- the trial

PATIENCE = "5s"
"""statement_timeout while a fault is planted: some make a loop without end."""


@dataclass(frozen=True)
class _Trial:
    """Where the faults are planted, and who judges them."""

    copy: Rehearsed
    asked: Asked
    proofs: Sequence[Check]

    @classmethod
    def of(cls, copy: Rehearsed, desired: Desired) -> _Trial:
        limits = desired.policy.apply.model_copy(update={"statement_timeout": PATIENCE})
        patient = replace(desired, policy=desired.policy.model_copy(update={"apply": limits}))
        proofs = [check for check in desired.checks.values() if check.kind == PROOF.name]
        return cls(copy, Asked(patient, copy.allow_functions, inside=True), proofs)

    def sessions(self, number: int) -> list[Check]:
        """The proofs that need so many sessions."""
        return [check for check in self.proofs if isinstance(check.spec, ProofSpec) and check.spec.sessions == number]


def _one_session(trial: _Trial, planted: Sequence[Mutant], told: Told) -> tuple[list[Mutant], dict[str, str | None]]:
    """Those that no proof of one session kills, and what became of the others: the proof's address, or refused ('')."""
    proofs = trial.sessions(1)
    kills: Counter[tuple[str, str]] = Counter()
    fates: dict[str, str | None] = {}
    left: list[Mutant] = []
    with pg.connect(trial.copy.dsn, "prove") as conn:
        _must_pass(conn, trial, proofs)
        for number, mutant in enumerate(planted, 1):
            # What killed the faults of this routine before comes first, then what names it.
            order = sorted(proofs, key=lambda each: (-kills[mutant.routine, each.address], not _names(each, mutant)))
            fate = _fate(conn, trial, order, mutant)
            if fate is None:
                left.append(mutant)
            else:
                fates[mutant.id] = fate
                kills[mutant.routine, fate] += 1
            told(number, len(planted), len(left))
    return left, fates


def _must_pass(conn: pg.Connection, trial: _Trial, proofs: Sequence[Check]) -> None:
    """Without a fault every proof passes. Raises ServerProblem."""
    _begin(conn, trial)
    verdicts = [PROOF.run(conn, check, trial.asked) for check in proofs]
    conn.rollback()
    wrong = [f"{each.address}: {each.status}: {each.detail}" for each in verdicts if each.status != "passed"]
    if wrong:
        raise ServerProblem(
            "Proofs fail on the rehearsal before any fault is planted.",
            details=wrong,
            hint="See `reconciler prove --rehearse`; mutation says something only about proofs that pass.",
        )


def _begin(conn: pg.Connection, trial: _Trial) -> None:
    pg.run(conn, "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
    pg.settings(conn, milliseconds(trial.asked.desired.policy.apply.statement_timeout))


def _names(check: Check, mutant: Mutant) -> bool:
    _, name, _ = split_identity(mutant.routine)
    spec = check.spec
    return isinstance(spec, ProofSpec) and any(name in step.when for step in spec.steps)


def _fate(conn: pg.Connection, trial: _Trial, proofs: Sequence[Check], mutant: Mutant) -> str | None:
    """The address of the proof that noticed; '' when PostgreSQL refused the mutant; None when nobody noticed."""
    _begin(conn, trial)
    try:
        try:
            _install(conn, trial, mutant)
        except ServerProblem:
            return ""
        for check in proofs:
            try:
                if PROOF.run(conn, check, trial.asked).status == "failed":
                    return check.address
            except ReconcilerError:
                if conn.closed or conn.broken:
                    raise
                return check.address  # what ends the whole transaction would have ended the apply
        return None
    finally:
        if not (conn.closed or conn.broken):
            conn.rollback()


def _install(conn: pg.Connection, trial: _Trial, mutant: Mutant) -> None:
    path = sql.SQL(", ").join(map(sql.Identifier, trial.asked.desired.policy.apply.search_path))
    pg.run(conn, sql.SQL("SET LOCAL search_path = {}").format(path))
    pg.execute(conn, mutant.text, doing=f"planting {mutant.id} in {mutant.routine}")
    pg.run(conn, "SET LOCAL search_path = ''")


def _two_sessions(trial: _Trial, left: Sequence[Mutant], fates: dict[str, str | None], told: Told) -> list[Mutant]:
    """Those that no proof of two sessions kills either. Each is committed in a database made for it."""
    proofs = trial.sessions(2)
    survivors: list[Mutant] = []
    for number, mutant in enumerate(left, 1):
        fate = _fate_of_two(trial, [check for check in proofs if _names(check, mutant)], mutant)
        if fate is None:
            survivors.append(mutant)
        else:
            fates[mutant.id] = fate
        told(number, len(left), len(survivors))
    return survivors


def _fate_of_two(trial: _Trial, proofs: Sequence[Check], mutant: Mutant) -> str | None:
    for check in proofs:
        parts = conninfo_to_dict(trial.copy.dsn)
        name = f"{parts['dbname']}_mutant"
        home = make_conninfo(trial.copy.dsn, dbname="postgres")
        try:
            with pg.connect(home, "prove") as admin:
                create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
                pg.run(admin, create.format(sql.Identifier(name), sql.Identifier(str(parts["dbname"]))))
            dsn = make_conninfo(trial.copy.dsn, dbname=name)
            with pg.connect(dsn, "prove") as conn, pg.connect(dsn, "prove") as other:
                _begin(conn, trial)
                _install(conn, trial, mutant)
                pg.run(conn, "COMMIT")
                if with_two_sessions(conn, other, check, trial.asked).status == "failed":
                    return check.address
        finally:
            with pg.connect(home, "prove") as admin:
                pg.run(admin, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
    return None
