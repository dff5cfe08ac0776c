"""Beside the tests: does a changed routine of Điều 45 still do what it did? It and its original play the same scenes.

Clock and chance belong to a scene: in a schema of its own stand a `clock_timestamp()`, a `now()` and a
`gen_random_uuid()` that do as the scene says, and both routines find them first on their search_path. So an outcome
(answer or error, and every row of every table afterwards) is compared byte by byte, a time can equal the clock to the
microsecond, and a scene has the same outcome however often it is played. To a scene belong also the planner's ways,
because an order that nobody asked for changes with them, and a rival session that ends jobs between two statements.

What needs two sessions that wait for each other, as a lock left out, cannot be seen here.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import sql

from tests.scenes import CHUNK, TABLES, Scene, scenes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from reconciler.mutants import Mutant

SHADOW = """
CREATE SCHEMA equivalence;
GRANT USAGE ON SCHEMA equivalence TO PUBLIC;

-- Each reading is later than the one before, as that of the true clock is.
CREATE FUNCTION equivalence.clock_timestamp() RETURNS timestamp with time zone LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_read constant timestamp with time zone := current_setting('equivalence.clock');
BEGIN
    PERFORM set_config('equivalence.clock', (v_read + current_setting('equivalence.tick')::interval)::text, true);
    RETURN v_read;
END $$;

CREATE FUNCTION equivalence.now() RETURNS timestamp with time zone LANGUAGE sql STABLE AS $$
    SELECT current_setting('equivalence.began')::timestamp with time zone $$;

CREATE FUNCTION equivalence.gen_random_uuid() RETURNS uuid LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN md5(set_config('equivalence.ids', (current_setting('equivalence.ids')::integer + 1)::text, true))::uuid;
END $$;

-- What another session commits meanwhile: it sees nothing of what is being inserted.
CREATE FUNCTION equivalence.rival() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('equivalence.rival', true) = 'true' THEN
        UPDATE public.job_queue AS q
        SET state = 'cancelled', finished_at = q.scheduled_at
        WHERE q.state IN ('queued', 'leased', 'in_progress', 'retry_waiting')
          AND q.job_id NOT IN (SELECT a.job_id FROM added AS a);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER rival AFTER INSERT ON public.job_queue REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION equivalence.rival();

-- Each scene: its rows, and each call on them with everything undone after it.
CREATE FUNCTION equivalence.play(p_scenes jsonb) RETURNS TABLE (answer text, failure text, tables jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    v_scene jsonb;
    v_call jsonb;
BEGIN
    -- Nobody vacuums here: without this, each scene would read the dead rows of all before it.
    -- It also makes new plans of all that is cached.
    PERFORM set_config('enable_' || way, p_scenes #>> '{0,indexes}', true)
    FROM unnest(ARRAY['indexscan', 'indexonlyscan', 'bitmapscan', 'nestloop']) AS way;
    TRUNCATE public.dot_config, public.job_queue, public.job_dead_letter, public.queue_heartbeat;
    FOR v_scene IN SELECT * FROM jsonb_array_elements(p_scenes) LOOP
        BEGIN
            INSERT INTO public.dot_config
            SELECT * FROM jsonb_populate_recordset(NULL::public.dot_config, v_scene -> 'dot_config');
            INSERT INTO public.job_queue
            SELECT * FROM jsonb_populate_recordset(NULL::public.job_queue, v_scene -> 'job_queue');
            INSERT INTO public.job_dead_letter
            SELECT * FROM jsonb_populate_recordset(NULL::public.job_dead_letter, v_scene -> 'job_dead_letter');
            INSERT INTO public.queue_heartbeat
            SELECT * FROM jsonb_populate_recordset(NULL::public.queue_heartbeat, v_scene -> 'queue_heartbeat');

            FOR v_call IN SELECT * FROM jsonb_array_elements(v_scene -> 'calls') LOOP
                answer := NULL;
                failure := NULL;
                BEGIN
                    PERFORM set_config('equivalence.clock', v_scene ->> 'clock', true),
                            set_config('equivalence.tick', v_scene ->> 'tick', true),
                            set_config('equivalence.began', v_scene ->> 'began', true),
                            set_config('equivalence.rival', v_scene ->> 'rival', true),
                            set_config('equivalence.ids', '0', true);
                    BEGIN
                        PERFORM set_config('role', v_call ->> 'role', true);
                        EXECUTE v_call ->> 'statement' INTO STRICT answer;
                        PERFORM set_config('role', 'none', true);
                    EXCEPTION WHEN OTHERS THEN
                        failure := SQLSTATE || ': ' || SQLERRM;
                    END;
                    tables := CASE WHEN (v_scene -> 'whole')::boolean THEN equivalence.rows()
                                   ELSE equivalence.digests() END;
                    RAISE EXCEPTION USING ERRCODE = 'UNDO0';
                EXCEPTION WHEN SQLSTATE 'UNDO0' THEN
                    NULL;
                END;
                RETURN NEXT;
            END LOOP;
            RAISE EXCEPTION USING ERRCODE = 'UNDO0';
        EXCEPTION WHEN SQLSTATE 'UNDO0' THEN
            NULL;
        END;
    END LOOP;
END $$;
"""

PINNED = "search_path=pg_catalog, public, pg_temp"
"""What every routine has."""


class Outcome(NamedTuple):
    """What a call did: its answer or its error, and what every table holds afterwards, or a digest of it."""

    answer: str | None
    failure: str | None
    tables: dict[str, Any]

    @property
    def reason(self) -> str | None:
        """Why the call was refused; None when it was not, and when it failed."""
        return json.loads(self.answer).get("reason") if self.answer is not None else None

    @property
    def succeeded(self) -> bool:
        """Neither an error nor a refusal."""
        return self.answer is not None and json.loads(self.answer)["refused"] is False


class Difference(NamedTuple):
    """An input for which a mutant does not do what its original does. `what`: how it shows, the original's first."""

    number: int
    input: str
    what: str

    def __str__(self) -> str:
        return f"input {self.number}: {self.what}; {self.input}"


class Bench:
    """A database of Phase 2 made ready for playing scenes; nothing that is played stays."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        """conn: of a superuser, in autocommit. The four tables are emptied, their defaults and trigger shadowed."""
        self.conn = conn
        self.patience = "60s"  # some mutants make a loop without end
        self._outcomes: dict[tuple[str, str, bool], list[Outcome]] = {}
        with conn.transaction():
            conn.execute(SHADOW)
            for table in TABLES:
                conn.execute(sql.SQL("DELETE FROM public.{}").format(sql.Identifier(table)))
            self._shadow_defaults()
            self._create_image("digests", sql.SQL('md5(string_agg(t::text, chr(10) ORDER BY t::text COLLATE "C"))'))
            self._create_image("rows", sql.SQL('jsonb_agg(t ORDER BY t::text COLLATE "C")'))
            # Every change of a job runs through it, whichever routine is played.
            self._shadow("public.fn_job_queue_updated_at()")

    def _shadow(self, routine: str) -> None:
        """Let the routine find our clock before that of the server."""
        ((path,),) = self.conn.execute("SELECT proconfig FROM pg_proc WHERE oid = %s::regprocedure", [routine])
        assert path == [PINNED], f"{routine}: {path}"
        change = sql.SQL("ALTER FUNCTION {} SET search_path = equivalence, pg_catalog, public, pg_temp")
        self.conn.execute(change.format(sql.SQL(routine)))  # pyright: ignore[reportArgumentType] - SQL as it stands

    def _shadow_defaults(self) -> None:
        query = """
            SELECT c.relname, a.attname, pg_get_expr(d.adbin, d.adrelid)
            FROM pg_attrdef AS d
            JOIN pg_attribute AS a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
            JOIN pg_class AS c ON c.oid = a.attrelid
            WHERE c.relnamespace = 'public'::regnamespace
        """
        for table, column, value in self.conn.execute(query).fetchall():
            if value in {"now()", "gen_random_uuid()"}:
                change = sql.SQL("ALTER TABLE public.{} ALTER COLUMN {} SET DEFAULT equivalence.{}()")
                names = (sql.Identifier(name) for name in (table, column, value.removesuffix("()")))
                self.conn.execute(change.format(*names))

    def _create_image(self, name: str, value: sql.SQL) -> None:
        query = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')"
        tables = [
            sql.SQL("{}, (SELECT {} FROM public.{} AS t)").format(sql.Literal(table), value, sql.Identifier(table))
            for (table,) in self.conn.execute(query).fetchall()
        ]
        create = "CREATE FUNCTION equivalence.{}() RETURNS jsonb LANGUAGE plpgsql AS $$BEGIN RETURN {}; END$$"
        pairs = sql.SQL("jsonb_build_object({})").format(sql.SQL(", ").join(tables))
        self.conn.execute(sql.SQL(create).format(sql.Identifier(name), pairs))

    @contextmanager
    def installed(self, routine: str, text: str) -> Iterator[None]:
        """The routine as `text` has it, but on the shadow clock, until the end of the block."""
        with self.conn.transaction(force_rollback=True):
            self.conn.execute("SELECT set_config('statement_timeout', %s, true)", [self.patience])
            self.conn.execute(re.sub("^CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", text).encode())
            self._shadow(routine)
            yield

    def play(self, some: Sequence[Scene], *, whole: bool = False) -> list[Outcome]:
        """The outcome of every call of the scenes, with what is installed."""
        found: list[Outcome] = []
        for first in range(0, len(some), CHUNK):
            asked = ", ".join(scene.asked(whole=whole) for scene in some[first : first + CHUNK])
            with self.conn.transaction(force_rollback=True):
                rows = self.conn.execute("SELECT * FROM equivalence.play(%s)", [f"[{asked}]"]).fetchall()
            found += [Outcome(*row) for row in rows]
        return found

    def outcomes(self, routine: str, text: str, *, ties: bool = True) -> list[Outcome]:
        """The outcomes of a routine for its scenes; played once and kept."""
        key = (routine, text, ties)
        if key not in self._outcomes:
            with self.installed(routine, text):
                self._outcomes[key] = self.play(scenes(routine, ties=ties))
        return self._outcomes[key]

    def difference(self, mutant: Mutant, text: str, *, ties: bool = True) -> Difference | None:
        """The first input for which a mutant does not do what its original, `text`, does; None when there is none.

        ties: as in `scenes`.
        """
        wanted = self.outcomes(mutant.routine, text, ties=ties)
        some = scenes(mutant.routine, ties=ties)
        done = 0
        try:
            with self.installed(mutant.routine, mutant.text):
                for first in range(0, len(some), CHUNK):
                    chunk = some[first : first + CHUNK]
                    for number, got in enumerate(self.play(chunk)):
                        if got != wanted[done + number]:
                            return self._told(mutant, text, chunk, number, done)
                    done += sum(len(scene.calls) for scene in chunk)
        except psycopg.Error as error:
            return Difference(done, "installing and playing it", str(error))
        return None

    def _told(self, mutant: Mutant, text: str, chunk: Sequence[Scene], number: int, before: int) -> Difference:
        """The chunk is played again as a whole: what is cached in a session is then as it was."""
        inputs = [scene.short(call) for scene in chunk for call in scene.calls]
        got = self.play(chunk, whole=True)[number]
        with self.installed(mutant.routine, text):
            wanted = self.play(chunk, whole=True)[number]
        return Difference(before + number, inputs[number], _compared(wanted, got))


def _compared(wanted: Outcome, got: Outcome) -> str:
    """What differs, place by place."""
    before, after = _leaves(wanted), _leaves(got)
    return ", ".join(
        f"{place} {before.get(place)!r} -> {after.get(place)!r}"
        for place in {**before, **after}
        if before.get(place) != after.get(place)
    )


def _leaves(outcome: Outcome) -> dict[str, Any]:
    """Every value of an outcome, by the way to it."""

    def below(value: Any, way: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                yield from below(inner, f"{way}.{name}" if way else name)
        elif isinstance(value, list) and value:
            for number, inner in enumerate(value):
                yield from below(inner, f"{way}[{number}]")
        else:
            yield way, value

    answer = json.loads(outcome.answer) if outcome.answer is not None else None
    return dict(below({"answer": answer, "error": outcome.failure, **outcome.tables}, ""))
