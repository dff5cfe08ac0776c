"""The forms that an invariant can have, told apart by one key. Declared and resolved alike, but for gates and pins."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from reconciler.model import GateStore, Json, Model
from reconciler.parts import relation, schema_and_pattern

MAX_ROWS = 100_000


class Forbidden(Model):
    """Things of which none may exist. `relation`: in any schema. `preload`: in a *_preload_libraries setting."""

    extension: str | None = None
    schema_name: str | None = Field(default=None, alias="schema")
    preload: str | None = None
    relation: str | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Forbidden:
        if not any((self.extension, self.schema_name, self.preload, self.relation)):
            raise ValueError("name at least one of extension, schema, preload, relation")
        return self


class Form(Model):
    """What every form has: why, and the list it belongs to in reports."""

    reason: str = ""
    group: str = ""


class ForbidInvariant(Form):
    """`forbid: {...}`."""

    forbid: Forbidden


class Exactly(Model):
    """A set of names, neither more nor fewer."""

    exactly: tuple[str, ...]


class ExtensionsInvariant(Form):
    """`extensions: {exactly: [...]}`."""

    extensions: Exactly


class GateInvariant(Form):
    """`gate: KEY, equals: "text"`; with `row: untouched` an apply must also leave the row itself alone."""

    gate: str
    equals: str
    row: Literal["untouched"] | None = None
    store: str | None = None


class GateInvariantSpec(Form):
    """The gate and where its row lives. `declared`: the value the files want, which an absent row will get."""

    gate: str
    equals: str
    row: Literal["untouched"] | None = None
    store: GateStore
    declared: str | None


class QueryInvariant(Form):
    """`query: SELECT ...` with `rows: N`, `equals: "text"` (one row, one column) or `unchanged: true` (by an apply)."""

    query: str
    rows: int | None = Field(default=None, ge=0, le=MAX_ROWS)
    equals: str | None = None
    unchanged: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_expectation(self) -> QueryInvariant:
        if sum(wish is not None for wish in (self.rows, self.equals, self.unchanged)) != 1:
            raise ValueError("write exactly one of `rows`, `equals` and `unchanged`")
        return self


class UntouchedInvariant(Form):
    """`untouched: [schema.table, ...]`: an apply writes to none of them (a transition: judged inside the apply)."""

    untouched: tuple[str, ...] = Field(min_length=1)


class Pinned(Model):
    """What is pinned: one table, several, or the functions of a schema by glob (`schema.pattern`).

    readers: roles that may be given plain SELECT on the tables, or lose it, without a word; every other right of theirs
    is pinned as anybody's. Who judges a table has to read it.
    """

    table: str | None = None
    tables: tuple[str, ...] | None = None
    functions: str | None = None
    readers: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one(self) -> Pinned:
        if len(self.named()) != 1:
            raise ValueError("write exactly one of `table`, `tables` and `functions`")
        if self.readers and self.functions is not None:
            raise ValueError("`readers` goes with `table` and `tables`: functions are not read")
        for name in self.every_table():
            relation(name)
        if self.functions is not None:
            schema_and_pattern(self.functions)
        return self

    def every_table(self) -> tuple[str, ...]:
        """The tables, however many were written."""
        return (self.table,) if self.table is not None else self.tables or ()

    def named(self) -> dict[str, Json]:
        """As the files say it, without `readers`: whoever they are, the same is captured."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"readers"})


class PinInvariant(Form):
    """`pin: {table: ...}` or `pin: {functions: ...}`: the definition is what `reconciler pin` captured."""

    pin: Pinned


class PinInvariantSpec(Form):
    """The pin with its captured lines."""

    pin: Pinned
    lines: tuple[str, ...]


class Proxy(Model):
    """What a query can see of an attested claim: its answer is the same before and after the apply."""

    query: str
    unchanged: Literal[True]


class AttestInvariant(Form):
    """`attest: sentence`: no query can see it; an approver signs for it. Never reported as held."""

    attest: str = Field(min_length=1)
    proxy: Proxy | None = None


FORMS: dict[str, type[Model]] = {
    "forbid": ForbidInvariant,
    "extensions": ExtensionsInvariant,
    "gate": GateInvariant,
    "query": QueryInvariant,
    "untouched": UntouchedInvariant,
    "pin": PinInvariant,
    "attest": AttestInvariant,
}
