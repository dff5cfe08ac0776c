"""What is reconciled, one file each. A kind declares, reads and renders one sort of object; here is their shape.

A new kind is a new module in this folder with a `KIND`; `desired`, `live`, `diff`, `plan` and `apply` find it here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import Field

from reconciler.model import (
    Absent,
    Change,
    Declared,
    Desired,
    Finding,
    Hazard,
    Json,
    JsonObject,
    Lock,
    Model,
    Need,
    Statement,
    canonical,
)
from reconciler.parts import Complaint, Context, discover

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reconciler import pg
    from reconciler.errors import Problem


@dataclass(frozen=True)
class Reading:
    """What one kind found: objects and facts by address, findings, undeclared objects among them."""

    items: Mapping[str, Model] = field(default_factory=dict[str, Model])
    facts: Mapping[str, Mapping[str, Json]] = field(default_factory=dict[str, "Mapping[str, Json]"])
    findings: Sequence[Finding] = ()


UNSEEN: Mapping[str, Json] = MappingProxyType({"not_judged": "a plan that connects to the database"})
"""In the place of facts, where an earlier look did not see an object: what would tell."""


class Bystander(NamedTuple):
    """Something of ours that a plan need not name: who wrote its row, and where it is: a table, or a routine's oid."""

    xmin: str
    at: str | int


class Blocked(Exception):
    """The live database does not allow this change; the message says why and names both values."""


class Retirement(Model):
    """In the place of a declaration: the object is taken out of the database, and why."""

    retire: str = Field(min_length=1)


class Writing(NamedTuple):
    """How the files would say what is live: new values of keys of the entry, the new text of its source file.

    retired: the entry is replaced by one that retires the object.
    """

    keys: Mapping[str, Json] = {}
    source: str | None = None
    retired: bool = False


class Wanted(NamedTuple):
    """The decision that something must change: the wanted object, and what else its statements are derived from."""

    after: Model
    context: JsonObject | None = None
    replace: bool = False


D = TypeVar("D", bound=Model)
S = TypeVar("S", bound=Model)
R = TypeVar("R", bound=Model)


class Kind(ABC, Generic[D, S, R]):
    """One sort of governed object. `order`: position in an apply; removals run in reverse, after everything else."""

    name: ClassVar[str]
    section: ClassVar[str]
    order: ClassVar[int]
    ours: ClassVar[bool] = True
    """Nobody but an apply should write its rows."""
    Declaration: type[D]
    Retirement: type[Retirement] = Retirement
    Spec: type[S]
    Rules: type[R]

    def forms(self) -> tuple[type[D], ...]:
        """Every form of a declaration, for the JSON Schema."""
        return (self.Declaration,)

    def form(self, data: Json) -> type[D]:
        """The form that an entry is meant to have."""
        return self.Declaration

    @abstractmethod
    def declare(
        self, name: str, declaration: D, context: Context
    ) -> tuple[S | None, R | None, list[Complaint | Problem]]:
        """One entry of the section, resolved offline. Collects every problem; the pair is None when there is any."""

    @abstractmethod
    def retire(
        self,
        name: str,
        retirement: Any,  # noqa: ANN401 - the kind's own form
        context: Context,
    ) -> tuple[Absent | None, R | None, list[Complaint]]:
        """One entry that retires its object, resolved offline."""

    @abstractmethod
    def look(
        self,
        conn: pg.Connection,
        wanted: Sequence[Declared],
        desired: Desired,
        allow_functions: Sequence[str],
        *,
        widely: bool = False,
    ) -> JsonObject:
        """What `found` needs of the database. Reads only.

        widely: also what the next version of the files may need, for a snapshot; without what is a secret.
        """

    @abstractmethod
    def found(self, seen: JsonObject, wanted: Sequence[Declared], desired: Desired) -> Reading:
        """The declared objects that exist, and findings for undeclared ones in scope. Pure.

        seen: what `look` gave, perhaps for other files. What it does not tell of an object is not guessed: its facts
        are UNSEEN.
        """

    def read(
        self, conn: pg.Connection, wanted: Sequence[Declared], desired: Desired, allow_functions: Sequence[str]
    ) -> Reading:
        """Both at once."""
        return self.found(self.look(conn, wanted, desired, allow_functions), wanted, desired)

    @abstractmethod
    def decide(self, spec: S, rules: R, live: S | None, facts: Mapping[str, Json]) -> Wanted | None:
        """None when in sync. Pure. Raises Blocked when the change may not be made from this live state."""

    def removable(self, live: S, rules: R, facts: Mapping[str, Json]) -> None:
        """Raises Blocked, naming what stands in the way, when this object may not be taken away. Pure."""

    @abstractmethod
    def render(self, before: S | None, after: S | None, rules: R, context: JsonObject | None) -> tuple[Statement, ...]:
        """The complete statements that lead from `before` to `after`. Pure."""

    @abstractmethod
    def hazards(self, before: S | None, after: S | None, rules: R) -> set[Hazard]:
        """What about this change a person must accept by name. Pure."""

    @abstractmethod
    def lock(self, conn: pg.Connection, change: Change, before: S | None, rules: R, ready: Callable[[], None]) -> None:
        """Take the locks that keep others from the object until COMMIT, writing nothing. Raises Stale, Locked.

        ready: called before each statement that may wait; it sets how long that one may.
        """

    @abstractmethod
    def locks(self, change: Change, rules: R) -> tuple[Lock, ...]:
        """What `lock` and the statements of a change lock, for people to read beforehand. Pure."""

    @abstractmethod
    def needs(self, change: Change, rules: R) -> tuple[Need, ...]:
        """What the role that applies, or the one a statement runs as, must be allowed for a change. Pure."""

    def backwards(self, before: S, rules: R, after: Json) -> R:
        """The rules under which an object may go back to `before` from `after`. Pure.

        Raises ValueError with a sentence when it never may.
        """
        return rules

    def rewritten(self, spec: S) -> Mapping[str, Json]:
        """The parts whose text the catalog does not keep: what `learn` must be asked for. Pure."""
        return {}

    def learn(self, conn: pg.Connection, after: S) -> Json:
        """Right after the statements of a change: what the ledger must remember to know the object again, or None."""
        return None

    def bystanders(self, conn: pg.Connection, wanted: Sequence[Declared], desired: Desired) -> dict[str, Bystander]:
        """By name, what an apply must leave alone unless its plan names it: what is in scope and not declared."""
        return {}

    def settled(self, after: S, live: S | None) -> bool:
        """Is what is there after the statements what was approved?"""
        return live == after

    def essence(self, live: S) -> S:
        """What of a live object the ledger remembers and drift is judged by."""
        return live

    def bound(self, conn: pg.Connection, change: Change, rules: R) -> tuple[str, ...]:
        """What the places $1 ... of its statement stand for: secrets, read anew and found to be the approved ones.

        Raises UsageError when nobody gives one, Stale when it is another one.
        """
        return ()

    def accept(self, item: Declared, live: S | None, installed: R, source: str) -> Writing:
        """How the files would say what is live. Pure. Raises ValueError with a sentence when they cannot, or may not.

        installed: the rules that the ledger knows. source: the text of the object's own file, if it has one.
        """
        raise ValueError(f"a {self.name} is not written back")

    def taken(self, item: Declared) -> Declared:
        """The declaration with what only the environment of this process says. Raises UsageError."""
        return item

    def guarded(self, desired: Desired, known: Mapping[str, Json]) -> list[str]:
        """What is declared and may not be, because of what the ledger knows of this kind: its manifest. Sentences."""
        return []

    def hidden(self, desired: Desired, known: Mapping[str, Json]) -> dict[str, Json]:
        """Entries of the ledger's manifest that hold what the files now call secret, as they may be shown."""
        return {}

    def masked(self, after: S, rules: R) -> S:
        """The wanted object without values that a plan for strangers must not show."""
        return after

    def declared(self, entry: Json) -> Declared:
        """A declaration from what `Declared.dump` made of it. Raises pydantic.ValidationError."""
        spec = entry["spec"]
        retired = "retire" in spec
        return Declared(
            kind=self.name,
            name=entry["name"],
            spec=Absent.model_validate_json(canonical(spec)) if retired else self.load(spec),
            rules=self.load_rules(entry["rules"]),
        )

    def load(self, spec: Json) -> S:
        """A spec from JSON types (strict models take tuples only from JSON). Raises pydantic.ValidationError."""
        return self.Spec.model_validate_json(canonical(spec))

    def load_rules(self, rules: Json) -> R:
        """Rules from JSON types. Raises pydantic.ValidationError."""
        return self.Rules.model_validate_json(canonical(rules))


def kinds() -> dict[str, Kind[Any, Any, Any]]:
    """Every kind, by name, in the order of an apply."""
    return dict(sorted(discover(__name__, list(__path__), "KIND").items(), key=lambda item: item[1].order))
