"""Beside the tests: hostile connections against an apply, thousands of times, and the numbers of what came of it.

`make race ROUNDS=10000`; `python -m tests.fault.race --help` says what else it can do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

from psycopg import sql

from reconciler import pg
from reconciler.kinds.function import Function
from reconciler.kinds.gate import Gate
from reconciler.kinds.marker import Marker
from reconciler.parts import identifier, raw
from tests import servers
from tests.fault.duel import ENDED, SERVER, Schedule, duel_on
from tests.fault.rivals import RIVALS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from queue import Queue

    from reconciler.model import Change
    from tests.fault.duel import Duel, Point, Round
    from tests.fault.rivals import Rival


# -------------------------------------------------------------------------------------- other locks than the product's


def _nothing(self: object, conn: pg.Connection, change: Change, before: Any, rules: Any, ready: Any) -> None:
    """The locks left out."""
    del self, conn, change, before, rules, ready


def _own_cost(self: object, conn: pg.Connection, change: Change, before: Any, rules: Any, ready: Any) -> None:
    """A no-op that writes back what it has read: locks the routine, and hides what a rival did in between."""
    del self, change, rules
    if before is not None:
        query = "SELECT procost FROM pg_catalog.pg_proc WHERE oid = %s::pg_catalog.regprocedure"
        cost = pg.rows(conn, query, (before.identity,))[0]["procost"]
        ready()
        pg.run(conn, sql.SQL("ALTER ROUTINE {} COST {}").format(raw(before.identity), sql.Literal(cost)))


def _own_value(self: object, conn: pg.Connection, change: Change, before: Any, rules: Any, ready: Any) -> None:
    """As `_own_cost`, for a row."""
    del self, change
    if before is not None:
        parts = {
            "table": identifier(before.table),
            "key": sql.Identifier(rules.store.key),
            "is": sql.Literal(before.key),
            "value": sql.Identifier(rules.store.value),
        }
        query = sql.SQL("SELECT {value} AS value FROM {table} WHERE {key} = {is}").format(**parts)
        found = pg.rows(conn, query)
        ready()
        if found:
            update = sql.SQL("UPDATE {table} SET {value} = {was} WHERE {key} = {is}")
            pg.run(conn, update.format(**parts, was=sql.Literal(found[0]["value"])))


LOCKS: dict[str, dict[type[Any], Any]] = {
    "product": {},
    "none": {Function: _nothing, Gate: _nothing, Marker: _nothing},
    "own-value": {Function: _own_cost, Gate: _own_value},
}
"""What `--locks` puts in the place of the product's: nothing but the functions that lock one object."""


@contextmanager
def locked_by(name: str) -> Iterator[None]:
    """Every apply inside takes these locks."""
    with ExitStack() as stack:
        for kind, lock in LOCKS[name].items():
            stack.enter_context(mock.patch.object(kind, "lock", lock))
        yield


# -------------------------------------------------------------------------------------------------------- many rounds

PORTION = 20
"""Rounds that a process tells of at once."""

STAGES = ("check", "lock", "read", "execute", "verify", "judge", "record", "commit")


def schedule(duel: Duel, rival: Rival, chance: random.Random) -> Schedule:
    """When a rival acts, by chance: a stage first, so that short stages are met as often as long ones."""
    steps = len(rival.statements) + 1
    by_stage: defaultdict[str, list[Point]] = defaultdict(list)
    for point in duel.points:
        by_stage[point.stage].append(point)
    order = {point: number for number, point in enumerate([*duel.points, ENDED])}

    def somewhere() -> Point:
        stage = chance.choice([*(stage for stage in STAGES if by_stage[stage]), "ended"])
        return ENDED if stage == "ended" else chance.choice(by_stage[stage])

    commit = chance.random() < 0.85
    kind = chance.random()
    if kind < 0.3:
        return Schedule(points=(somewhere(),) * steps, commit=commit)
    if kind < 0.7:
        points = tuple(sorted((somewhere() for _ in range(steps)), key=order.__getitem__))
        return Schedule(points=points, commit=commit, impatient=chance.random() < 0.95)
    delays = tuple(sorted(chance.uniform(0, 1.2 * duel.seconds) for _ in range(steps)))
    return Schedule(delays=delays, commit=commit)


@dataclass
class Tally:
    """Numbers of many rounds."""

    rounds: int = 0
    applies: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    ends: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    lost: list[str] = field(default_factory=list[str])
    errors: list[str] = field(default_factory=list[str])

    def add(self, done: Round) -> None:
        """Count a round."""
        self.rounds += 1
        self.applies[done.rival.name, done.apply if not done.apply.startswith("exit") else "error"] += 1
        self.ends[done.rival.name, done.rival_end] += 1
        if done.lost:
            self.lost.append(f"{done.rival.name}: {done.lost} ({done.schedule})")
        if done.apply.startswith("exit"):
            self.errors.append(f"{done.rival.name}: {done.apply} ({done.schedule})")

    def merge(self, other: Tally) -> None:
        """Add the numbers of another."""
        self.rounds += other.rounds
        self.applies += other.applies
        self.ends += other.ends
        self.lost += other.lost
        self.errors += other.errors

    @property
    def victims(self) -> int:
        """How often a rival was the victim of a deadlock."""
        return sum(number for (_, end), number in self.ends.items() if end == "40P01")

    def total(self, word: str) -> int:
        """How many applies ended with this word."""
        return sum(number for (_, end), number in self.applies.items() if end == word)

    def line(self) -> str:
        """The numbers that matter."""
        applies = ", ".join(f"{self.total(word)} {word}" for word in sorted({end for _, end in self.applies}))
        return (
            f"{self.rounds} rounds: {applies}; "
            f"lost updates {len(self.lost)}, rivals as deadlock victims {self.victims}, errors {len(self.errors)}"
        )

    def table(self) -> str:
        """One line for each rival."""
        names = sorted({name for name, _ in self.applies})
        lines = [f"{'rival':<40} {'applied':>8} {'refused':>8}   its transaction"]
        for name in names:
            words = {end: number for (rival, end), number in self.applies.items() if rival == name}
            ends = {end: number for (rival, end), number in self.ends.items() if rival == name}
            applied = words.pop("applied", 0)
            told = ", ".join(f"{number} {end}" for end, number in sorted(ends.items(), key=lambda pair: -pair[1]))
            lines.append(f"{name:<40} {applied:>8} {sum(words.values()):>8}   {told}")
        return "\n".join(lines)


def rounds(duel: Duel, rivals: Sequence[Rival], number: int, seed: int) -> Iterator[Round]:
    """So many rounds, every rival as often as the others."""
    chance = random.Random(seed)
    for count in range(number):
        rival = rivals[count % len(rivals)]
        yield duel.play(rival, schedule(duel, rival, chance))


def _work(server: servers.Server, asked: argparse.Namespace, number: int, results: Queue[Tally | str | None]) -> None:
    """One process: its share of the rounds, told in portions; None at the end, or a text when the harness broke."""
    rivals = [rival for rival in RIVALS if asked.rival in rival.name]
    share = asked.rounds // asked.workers + (number < asked.rounds % asked.workers)
    # Every process begins with another rival, so that few rounds meet all of them.
    begin = number * len(rivals) // asked.workers
    try:
        with locked_by(asked.locks), duel_on(server, f"race_{number}") as duel:
            tally = Tally()
            for done in rounds(duel, [*rivals[begin:], *rivals[:begin]], share, asked.seed + number):
                tally.add(done)
                if tally.rounds == PORTION:
                    results.put(tally)
                    tally = Tally()
            results.put(tally)
        results.put(None)
    except KeyboardInterrupt:
        results.put("interrupted")
    except Exception:  # noqa: BLE001 - the process that waits for us must not wait for ever
        results.put(traceback.format_exc())


def race(server: servers.Server, asked: argparse.Namespace, begun: float) -> Tally:
    """All rounds, in several processes; says every ten seconds how it stands."""
    spawn = multiprocessing.get_context("spawn")
    results: Queue[Tally | str | None] = spawn.Queue()  # pyright: ignore[reportAssignmentType] - has its get and put
    workers = [spawn.Process(target=_work, args=(server, asked, n, results), daemon=True) for n in range(asked.workers)]
    for worker in workers:
        worker.start()
    total, left, shown = Tally(), len(workers), time.monotonic()
    while left:
        part = results.get(timeout=600)
        if isinstance(part, str):
            raise RuntimeError(part)  # noqa: TRY004 - it is the other process that failed
        if part is None:
            left -= 1
        else:
            total.merge(part)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            say(f"{shown - begun:6.0f} s  {total.line()}")
    return total


def say(text: str) -> None:
    """A line of the answer."""
    print(text, flush=True)  # noqa: T201 - a command


def main(arguments: Sequence[str]) -> int:
    """Race and print the numbers; 1 when something was lost, or an application paid for a deadlock."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fault.race", description="Hostile connections against apply."
    )
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2, help="processes, each with a database")
    parser.add_argument("--seed", type=int, default=None, help="to see the same schedules again")
    parser.add_argument("--server", default=os.environ.get("RECONCILER_TEST_SERVER", "16"), help="embedded or a major")
    parser.add_argument("--locks", choices=sorted(LOCKS), default="product", help="what the apply locks with")
    parser.add_argument("--rival", default="", help="only rivals whose name contains this")
    asked = parser.parse_args(arguments)
    asked.seed = random.randrange(1_000_000) if asked.seed is None else asked.seed
    guard = servers.Guard()
    begun = time.monotonic()
    try:
        server = servers.start(guard.run / "race", asked.server, SERVER)
        version = f"{server.version // 10_000}.{server.version % 10_000}"
        say(f"PostgreSQL {version}, locks: {asked.locks}, seed {asked.seed}, {asked.workers} processes")
        total = race(server, asked, begun)
    finally:
        guard.release()
    seconds = time.monotonic() - begun
    say(total.table())
    for what, found in (("LOST", total.lost), ("ERROR", total.errors)):
        for one in found[:20]:
            say(f"{what}: {one}")
    say(f"{total.line()}; {seconds:.0f} s, {total.rounds / seconds:.1f} rounds a second")
    return 1 if total.lost or total.victims or total.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
