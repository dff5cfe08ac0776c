"""Check `surface`: numbers around the change, predicted from the plan, compared after it. A wrong one blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from reconciler import pg, transitions
from reconciler.allowlist import check_query
from reconciler.checks import CheckKind
from reconciler.model import Asked, Change, Check, Declared, Json, Model, Verdict, canonical, glob_match
from reconciler.parts import Complaint, Context, relation, single_value, unreadable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Counts(Model):
    """What the number counts, so that the plan predicts it: changes of one kind, perhaps only some of them."""

    kind: Literal["function", "gate", "marker"]
    schema_name: str | None = Field(default=None, alias="schema")
    table: str | None = None
    matching: str = "*"


class Row(Model):
    """One row of the surface. Exactly one of `counts` and `expect`; `unchanged` when neither is written.

    unchanged: the same text. background: a number that may grow, but not by us (`relation` names where we would write).
    not_before: unchanged or later. observed: shown, never judged.
    """

    query: str
    counts: Counts | None = None
    expect: Literal["unchanged", "background", "not_before", "observed"] | None = None
    relation: str | None = None
    reason: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Row:
        if self.counts is not None and self.expect is not None:
            raise ValueError("write `counts` or `expect`, not both")
        if (self.expect == "background") != (self.relation is not None):
            raise ValueError("`expect: background` and `relation` go together: it says where our own writes would show")
        if self.relation is not None:
            relation(self.relation)
        return self


class Surface(CheckKind):
    """Reads each number before and after, and holds the difference against the plan."""

    name = "surface"
    section = "surface"
    order = 20

    def forms(self) -> Sequence[type[Model]]:
        """One form."""
        return (Row,)

    def form(self, data: Json) -> tuple[type[Model] | None, str]:
        """One form."""
        return Row, ""

    def declare(
        self, name: str, declaration: Model, context: Context, items: Mapping[str, Declared]
    ) -> tuple[Model | None, list[Complaint]]:
        """Hold the query against the allowlist."""
        report = check_query(_row(declaration).query, context.policy.allow_functions)
        problems = [Complaint(("query",), trouble.message) for trouble in report.troubles]
        return (None if problems else declaration), problems

    def load(self, spec: Json) -> Model:
        """A row from JSON types."""
        return Row.model_validate_json(canonical(spec))

    def remember(self, conn: pg.Connection, check: Check, asked: Asked) -> Json:
        """The value before, and the state of the relation that we must not write to."""
        row = _row(check.spec)
        if _hidden(conn, row, asked):
            return None
        value, error = single_value(conn, row.query, f"reading {check.address}")
        memo: dict[str, Json] = {"value": value, "error": error}
        if row.relation is not None:
            memo["relations"] = transitions.family(conn, [row.relation])
        return memo

    def run(self, conn: pg.Connection, check: Check, asked: Asked) -> Verdict:
        """In a plan only the prediction; inside an apply the comparison."""
        row = _row(check.spec)
        predicted = _predicted(row, asked.changes)
        if hidden := _hidden(conn, row, asked):
            return Verdict(address=check.address, status="not_judged", detail=hidden[1], missing=hidden[0])
        if not asked.inside:
            detail = "predicted from the plan, compared inside the apply"
            return Verdict(address=check.address, status="deferred", detail=detail)
        before: str | None = asked.memo["value"]
        after, error = single_value(conn, row.query, f"reading {check.address}")
        if before is None or after is None:
            detail = f"the query {error or asked.memo['error']}"
            return Verdict(address=check.address, status="differs", detail=detail, predicted=predicted)
        wrong = _wrong(conn, row, before, after, asked)
        return Verdict(
            address=check.address,
            status="differs" if wrong else "predicted",
            detail=wrong or _difference(before, after),
            before=before,
            after=after,
            predicted=predicted,
        )


def _row(spec: Model) -> Row:
    if not isinstance(spec, Row):
        raise TypeError(spec)
    return spec


def _hidden(conn: pg.Connection, row: Row, asked: Asked) -> tuple[str, str] | None:
    report = check_query(row.query, asked.allow_functions)
    if report.troubles:
        return "allow_functions", f"the installed policy does not allow it: {report.troubles[0].message}"
    return unreadable(conn, report.relations)


def _predicted(row: Row, changes: Sequence[Change]) -> str:
    if row.counts is None:
        words = {"background": "any, none by us", "not_before": "unchanged or later", "observed": "not predicted"}
        return words.get(row.expect or "", "unchanged")
    delta = expected(row.counts, changes)
    return f"{delta:+d}" if delta else "0"


def expected(counts: Counts, changes: Sequence[Change]) -> int:
    """How many more objects of this sort the changes leave behind."""

    def counted(change: Change) -> bool:
        thing = change.after or change.before or {}
        name = change.address.partition(".")[2]
        return (
            change.kind == counts.kind
            and counts.schema_name in {None, thing.get("schema_name")}
            and counts.table in {None, thing.get("table")}
            and glob_match(counts.matching, thing.get("name", name) if counts.kind == "function" else name)
        )

    return sum(("add" in change.actions) - ("remove" in change.actions) for change in changes if counted(change))


def _wrong(conn: pg.Connection, row: Row, before: str, after: str, asked: Asked) -> str:
    """What about this row is not as predicted; empty when it is."""
    match row.expect:
        case "observed":
            wrong = ""
        case "background":
            touched = transitions.touched(conn, asked.memo["relations"]["found"])
            fewer = f"{before} -> {after}, fewer than before" if _whole(after) < _whole(before) else ""
            wrong = f"we wrote to it: {'; '.join(touched)}" if touched else fewer
        case "not_before":
            # ISO text in UTC sorts as time does, numbers are compared as numbers.
            earlier = _whole(after) < _whole(before) if before.isdigit() and after.isdigit() else after < before
            wrong = f"{before} -> {after}, earlier than before" if earlier else ""
        case _ if row.counts is not None:
            delta = expected(row.counts, asked.changes)
            wrong = "" if _whole(after) - _whole(before) == delta else f"{before} -> {after}, predicted {delta:+d}"
        case _:
            wrong = "" if before == after else f"{before} -> {after}, predicted unchanged"
    return wrong


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else -1


def _difference(before: str, after: str) -> str:
    if before == after:
        return f"{after}, unchanged"
    if before.isdigit() and after.isdigit():
        return f"{before} -> {after} ({int(after) - int(before):+d})"
    return f"{before} -> {after}"


CHECK = Surface()
