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
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
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
from tests.fault.arena import ENDED, SERVER, Schedule, arena_on
from tests.fault.rivals import RIVALS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from queue import Queue

    from reconciler.model import Change
    from tests.fault.arena import Arena, Point, Round
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
"""What `--locks` puts in the place of the product's."""


@contextmanager
def locked_by(name: str) -> Iterator[None]:
    """Every apply inside takes these locks."""
    with ExitStack() as stack:
        for kind, lock in LOCKS[name].items():
            stack.enter_context(mock.patch.object(kind, "lock", lock))
        yield


# -------------------------------------------------------------------------------------------------------- many rounds

STAGES = ("check", "lock", "read", "execute", "verify", "judge", "record", "commit")


def schedule(arena: Arena, rival: Rival, chance: random.Random) -> Schedule:
    """When a rival acts, by chance: a stage first, so that short stages are met as often as long ones."""
    steps = len(rival.statements) + 1
    by_stage: defaultdict[str, list[Point]] = defaultdict(list)
    for point in arena.points:
        by_stage[point.stage].append(point)
    order = {point: number for number, point in enumerate([*arena.points, ENDED])}

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
    delays = tuple(sorted(chance.uniform(0, 1.2 * arena.seconds) for _ in range(steps)))
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


def rounds(arena: Arena, rivals: Sequence[Rival], number: int, seed: int) -> Iterator[Round]:
    """So many rounds, every rival as often as the others."""
    chance = random.Random(seed)
    for count in range(number):
        rival = rivals[count % len(rivals)]
        yield arena.play(rival, schedule(arena, rival, chance))


def _work(server: servers.Server, asked: argparse.Namespace, number: int, results: Queue[Tally | None]) -> None:
    """One process: its share of the rounds, told in portions."""
    rivals = [rival for rival in RIVALS if asked.rival in rival.name]
    share = asked.rounds // asked.workers + (number < asked.rounds % asked.workers)
    with suppress(KeyboardInterrupt), locked_by(asked.locks), arena_on(server, f"race_{number}") as arena:
        tally = Tally()
        # Every process begins with another rival, so that few rounds meet all of them.
        turned = [*rivals[number * len(rivals) // asked.workers :], *rivals[: number * len(rivals) // asked.workers]]
        for done in rounds(arena, turned, share, asked.seed + number):
            tally.add(done)
            if tally.rounds == 20:
                results.put(tally)
                tally = Tally()
        results.put(tally)
    results.put(None)


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
    total, begun = Tally(), time.monotonic()
    try:
        server = servers.start(guard.run / "race", asked.server, SERVER)
        version = f"{server.version // 10_000}.{server.version % 10_000}"
        print(f"PostgreSQL {version}, locks: {asked.locks}, seed {asked.seed}, {asked.workers} processes")
        spawn = multiprocessing.get_context("spawn")
        results: Queue[Tally | None] = spawn.Queue()
        workers = [spawn.Process(target=_work, args=(server, asked, n, results)) for n in range(asked.workers)]
        for worker in workers:
            worker.start()
        left, shown = len(workers), time.monotonic()
        while left:
            part = results.get(timeout=300)
            if part is None:
                left -= 1
                continue
            total.merge(part)
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                print(f"{shown - begun:6.0f} s  {total.line()}", flush=True)
        for worker in workers:
            worker.join()
    finally:
        guard.release()
    seconds = time.monotonic() - begun
    print(total.table())
    print(*(f"LOST: {lost}" for lost in total.lost[:20]), *(f"ERROR: {error}" for error in total.errors[:20]), sep="\n")
    print(f"{total.line()}; {seconds:.0f} s, {total.rounds / seconds:.0f} rounds a second")
    return 1 if total.lost or total.victims or total.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
