"""What is verified, one file each. A check looks at the database and gives a verdict; this is the shape they share.

A new check is a new module in this folder with a `CHECK`; `desired` and `live` find it here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, cast

from reconciler.allowlist import check_query
from reconciler.parts import Complaint, Context, discover, hidden_needs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from reconciler.model import Asked, Check, Declared, Json, Model, Need, Verdict
    from reconciler.pg import Connection


class CheckKind(ABC):
    """One sort of check."""

    name: ClassVar[str]
    section: ClassVar[str]
    order: ClassVar[int]
    """Position among the sorts of checks when an apply judges."""

    @abstractmethod
    def form(self, data: Json) -> tuple[type[Model] | None, str]:
        """The model that this entry must fit, chosen by the keys it has; or None and a sentence."""

    @abstractmethod
    def forms(self) -> Sequence[type[Model]]:
        """Every model that an entry may fit."""

    @abstractmethod
    def declare(
        self, name: str, declaration: Model, context: Context, items: Mapping[str, Declared]
    ) -> tuple[Model | None, list[Complaint]]:
        """The entry, resolved offline, with every problem."""

    @abstractmethod
    def load(self, spec: Json) -> Model:
        """A resolved spec from JSON types."""

    def remember(self, conn: Connection, check: Check, asked: Asked) -> Json:
        """At BEGIN of an apply, under the locks: what `run` must compare with just before COMMIT. Reads only."""
        return None

    def needs(self, check: Check) -> tuple[Need, ...]:
        """What the role that applies must be allowed for judging it inside an apply. Pure."""
        return tuple(
            need
            for query in queries(check.spec.dump())
            for need in hidden_needs(check.address, check_query(query).relations)
        )

    def number(self, conn: Connection, check: Check, asked: Asked) -> str | None:
        """What a row of the surface is at this moment; None for every other sort of check, and for what is hidden."""
        return None

    def planned(self, check: Check) -> Verdict | None:
        """What `run` says outside of an apply, where that does not depend on the database; else None. Pure."""
        return None

    @abstractmethod
    def run(self, conn: Connection, check: Check, asked: Asked) -> Verdict:
        """Judge; only a proof may write, inside a savepoint. What the role may not see is no error but a verdict."""


def queries(declared: Json) -> Iterator[str]:
    """Every query inside of a declaration: what stands under the key `query`, however deep."""
    if isinstance(declared, dict):
        for key, value in cast("dict[str, Json]", declared).items():
            if key == "query" and isinstance(value, str):
                yield value
            else:
                yield from queries(value)
    elif isinstance(declared, list):
        for value in cast("list[Json]", declared):
            yield from queries(value)


def checks() -> dict[str, CheckKind]:
    """Every sort of check, by name, in the order in which an apply judges."""
    found: dict[str, CheckKind] = discover(__name__, list(__path__), "CHECK")
    return dict(sorted(found.items(), key=lambda item: item[1].order))
