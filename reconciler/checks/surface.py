"""Check `surface`: numbers around the change, predicted from the plan, compared after it. A wrong one blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from reconciler import pg, transitions
from reconciler.allowlist import check_query, counted
from reconciler.checks import CheckKind
from reconciler.model import BY_OTHERS, Asked, Change, Check, Declared, Json, Model, Verdict, canonical, glob_match
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
    not_before: unchanged or later. observed: shown, never judged. What others write meanwhile is theirs: where our own
    writes can be told from it, `unchanged` and `counts` speak of ours alone.
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
        """The value before, and what this backend has written so far to the tables it is read from."""
        row = _row(check.spec)
        if _hidden(conn, row, asked):
            return None
        value, error = single_value(conn, row.query, f"reading {check.address}")
        memo: dict[str, Json] = {"value": value, "error": error}
        if row.relation is not None:
            memo["relations"] = transitions.family(conn, [row.relation])
        if row.expect in {None, "unchanged"}:
            memo["watched"] = transitions.watch(conn, row.query)
        return memo

    def number(self, conn: pg.Connection, check: Check, asked: Asked) -> str | None:
        """The value now."""
        row = _row(check.spec)
        return None if _hidden(conn, row, asked) else single_value(conn, row.query, f"reading {check.address}")[0]

    def planned(self, check: Check) -> Verdict:
        """Only the prediction."""
        detail = "predicted from the plan, compared inside the apply"
        return Verdict(address=check.address, status="deferred", detail=detail)

    def run(self, conn: pg.Connection, check: Check, asked: Asked) -> Verdict:
        """In a plan only the prediction; inside an apply the comparison."""
        row = _row(check.spec)
        predicted = _predicted(row, asked.changes)
        if hidden := _hidden(conn, row, asked):
            return Verdict(address=check.address, status="not_judged", detail=hidden[1], missing=hidden[0])
        if not asked.inside:
            return self.planned(check)
        if asked.memo is None:
            detail = "the role could not read it when the transaction began"
            return Verdict(address=check.address, status="not_judged", detail=detail, missing="the value before")
        before: str | None = asked.memo["value"]
        after, error = single_value(conn, row.query, f"reading {check.address}")
        if before is None or after is None:
            detail = f"the query {error or asked.memo['error']}"
            return Verdict(address=check.address, status="differs", detail=detail, predicted=predicted)
        wrong, theirs = _wrong(conn, row, before, after, asked)
        return Verdict(
            address=check.address,
            status="differs" if wrong else "predicted",
            detail=wrong or _difference(before, after) + theirs,
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


def _wrong(conn: pg.Connection, row: Row, before: str, after: str, asked: Asked) -> tuple[str, str]:
    """What about this row is not as predicted, empty when it is; and how much of the difference is by others."""
    match row.expect:
        case "observed":
            return "", ""
        case "background":
            touched = transitions.touched(conn, asked.memo["relations"])
            fewer = f"{before} -> {after}, fewer than before" if _whole(after) < _whole(before) else ""
            wrong = f"we wrote to it: {'; '.join(touched)}" if touched else fewer
            return wrong, _by_others(_whole(after) - _whole(before))
        case "not_before":
            # ISO text in UTC sorts as time does, numbers are compared as numbers.
            earlier = _whole(after) < _whole(before) if before.isdigit() and after.isdigit() else after < before
            return f"{before} -> {after}, earlier than before" if earlier else "", ""
        case _:
            own = transitions.own(conn, asked.memo["watched"])
            return _alone(row, before, after, asked.changes, own)


def _alone(row: Row, before: str, after: str, changes: Sequence[Change], own: transitions.Own) -> tuple[str, str]:
    """Held against the prediction as if the apply had run alone; returns what `_wrong` does.

    A table counted whole: its difference is what we inserted less what we deleted, whatever others do. Any other query:
    a difference that is not as predicted is by others when we wrote nothing that it reads, or only what was planned.
    """
    predicted = 0 if row.counts is None else expected(row.counts, changes)
    numbers = before.isdigit() and after.isdigit()
    difference = int(after) - int(before) if numbers else 0
    as_predicted = difference == predicted if numbers else before == after and row.counts is None
    said = f"{before} -> {after}, predicted {'unchanged' if row.counts is None else format(predicted, '+d')}"
    if own.unknown:
        return ("" if as_predicted else f"{said}; {own.unknown}"), ""
    if numbers and counted(row.query):
        ours = own.inserted - own.deleted
        wrong = "" if ours == predicted else f"{said}, and of our own it is {ours:+d}"
        return wrong, _by_others(difference - ours)
    if as_predicted:
        return "", ""
    if own.wrote and (own.inserted, own.updated, own.deleted) != _planned(row, changes):
        return f"{said}; {'; '.join(own.wrote)}", ""
    if predicted and not own.wrote:
        return f"{said}, and nothing of it is our own", ""
    return "", _by_others(difference - predicted) if numbers else f", {BY_OTHERS}"


def _planned(row: Row, changes: Sequence[Change]) -> tuple[int, int, int]:
    """How many rows the changes insert, update and delete in the tables that the query reads."""
    tables = {relation(name) for name in check_query(row.query).relations}
    here = [
        change.actions
        for change in changes
        if change.kind in {"gate", "marker"} and relation((change.after or change.before or {})["table"]) in tables
    ]
    inserted, updated, deleted = (sum(action in actions for actions in here) for action in ("add", "change", "remove"))
    return inserted, updated, deleted


def _by_others(number: int) -> str:
    return f", {number:+d} {BY_OTHERS}" if number else ""


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else -1


def _difference(before: str, after: str) -> str:
    if before == after:
        return f"{after}, unchanged"
    if before.isdigit() and after.isdigit():
        return f"{before} -> {after} ({int(after) - int(before):+d})"
    return f"{before} -> {after}"


CHECK = Surface()
