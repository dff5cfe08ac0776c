"""Below `cli`: the commands `reconciler fleet ...`. As there: parse -> call -> render -> exit code, and no rule.

Modules that are slow to import are imported by the command that uses them.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from reconciler.cli_edges import (
    F,
    aside,
    colour,
    evidence_parent,
    interrupt,
    options_for,
    print_json,
    untested_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reconciler.fleet.files import Fleet, Member
    from reconciler.fleet.report import FleetReport, TargetResult

FORMATS = ("text", "json")

WAITS = 0.5
"""Seconds between two looks how far a round has come."""

SHORTEST_TOKEN = 16
"""Characters of a token that nobody guesses."""


def _file_argument(command: F) -> F:
    return click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default=Path("fleet.yaml"))(command)


def _choice_options(command: F) -> F:
    command = click.option("--only", multiple=True, metavar="NAME", help="This target (repeatable).")(command)
    return click.option(
        "--select", multiple=True, metavar="LABEL=VALUE", help="Targets with this label (repeatable: with all of them)."
    )(command)


def _workers_option(command: F) -> F:
    return click.option(
        "--workers", type=click.IntRange(1, 64), help="So many targets at a time; else `workers` of the file."
    )(command)


def _queue_option(command: F) -> F:
    return click.option(
        "--queue",
        "--dsn",
        "queue_dsn",
        envvar="RECONCILER_QUEUE",
        required=True,
        metavar="DSN",
        help="The database of the queue and the results; else RECONCILER_QUEUE.",
    )(command)


def _source_argument(command: F) -> F:
    return click.argument("source", metavar="[FILE]", required=False, type=click.Path(path_type=Path, dir_okay=False))(
        command
    )


def _results_option(command: F) -> F:
    return click.option(
        "--queue",
        "queue_dsn",
        envvar="RECONCILER_QUEUE",
        metavar="DSN",
        help="The database of the results, where no FILE is given; else RECONCILER_QUEUE.",
    )(command)


def _output_options(command: F) -> F:
    return options_for(command, FORMATS)


def _out_option(command: F) -> F:
    return click.option(
        "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the report here, whole or not at all."
    )(command)


@click.group()
def fleet() -> None:
    """The same for many databases: drift, plan, and apply in waves; on one machine or on several.

    \b
    Examples:
      reconciler fleet drift fleet.yaml --workers 8
      reconciler fleet plan fleet.yaml --out plans
      reconciler fleet apply plans/3f2a91c07be4.fleet.plan --file fleet.yaml
    """


@fleet.command()
@_file_argument
@_choice_options
@_workers_option
@untested_option
@_output_options
@_out_option
@click.option("--fail-on", default="", help="Findings or classes that also exit 2, as for drift.")
@click.option(
    "--queue",
    "queue_dsn",
    metavar="DSN",
    help="Have the workers of this queue look, and wait for them; without it, look from here.",
)
@click.pass_context
def drift(ctx: click.Context, /, file: Path, **given: Any) -> None:  # noqa: ANN401 - options of every type
    """Look at every target. The exit code is the worst of all: 5, 1, 4, 3, 2, 0.

    \b
    Examples:
      reconciler fleet drift
      reconciler fleet drift fleet.yaml --select region=eu --workers 8 --out drift.json --format json
      reconciler fleet drift fleet.yaml --queue "service=fleet"
    """
    from reconciler import drift as drifting
    from reconciler.fleet import files, looks, members, pool

    fail_on = drifting.finding_codes(given["fail_on"])
    found = files.load(file)
    chosen = members.choose(members.resolve(found), given["select"], given["only"])
    if given["queue_dsn"]:
        ctx.exit(_tell(given, _queued(found, chosen, given)))
    round_ = _Round("drift", found, given["workers"])
    signal.signal(signal.SIGTERM, interrupt)
    done = pool.run(
        chosen,
        lambda member: looks.drift(found, member, fail_on=fail_on, untested=given["allow_untested_server"]),
        workers=round_.workers,
        told=_Progress(len(chosen)),
        warned=_warned,
    )
    done.results |= {member.name: looks.left(member) for member in chosen if member.name in done.left}
    told = round_.report(pool.in_order(chosen, done), interrupted=done.interrupted)
    ctx.exit(_tell(given, told))


@fleet.command()
@_file_argument
@_choice_options
@_workers_option
@untested_option
@_output_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Save a plan for each group of targets in this directory, new or empty.",
)
@click.option("--detailed-exitcode", is_flag=True, help="Exit 2 when there are changes.")
@click.option("--show-values", is_flag=True, help="With -v: print values that declared queries gave; as for plan.")
@click.pass_context
def plan(ctx: click.Context, /, file: Path, **given: Any) -> None:  # noqa: ANN401 - as drift
    """Plan every target; those with the same changes from the same state are one group and take one approval.

    \b
    Examples:
      reconciler fleet plan
      reconciler fleet plan fleet.yaml --select region=eu --out plans --detailed-exitcode
    """
    from reconciler import plan as plans
    from reconciler.fleet import files, groups, looks, members, pool
    from reconciler.fleet import text as texts
    from reconciler.render import text

    found = files.load(file)
    chosen = members.choose(members.resolve(found), given["select"], given["only"])
    if given["out"] is not None:
        _new(given["out"])
    round_ = _Round("plan", found, given["workers"])
    progress = _Progress(len(chosen))
    signal.signal(signal.SIGTERM, interrupt)
    done = pool.run(
        chosen,
        lambda member: looks.plan(found, member, untested=given["allow_untested_server"]),
        workers=round_.workers,
        told=lambda member, planned: progress(member, planned.result),
        warned=_warned,
    )
    results = pool.Done({name: one.result for name, one in done.results.items()}, done.left, done.interrupted)
    results.results |= {member.name: looks.left(member) for member in chosen if member.name in done.left}
    told = round_.report(pool.in_order(chosen, results), interrupted=done.interrupted)
    made = groups.make(found.name, [one.plan for one in done.results.values() if one.plan is not None])
    if given["form"] == "text":
        for group in made:
            click.echo(f"Group {texts.group_line(group)}")
            if given["verbose"]:
                shown = group.plan if given["show_values"] else plans.masked(group.plan)
                click.echo(text.plan(shown, colour=colour(given["no_color"]), verbose=False), nl=False)
    code = _tell({**given, "out": None}, told)
    if given["out"] is not None and not done.interrupted:
        _save(given["out"], made)
    ctx.exit(2 if code == 0 and made and given["detailed_exitcode"] else code)


def _new(folder: Path) -> None:
    """Make the directory, or take one that is empty: plans of two rounds side by side would be applied as one."""
    from reconciler.errors import UsageError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty.", hint="Plans of one round stand alone: name a new directory.")
    except OSError as error:
        raise UsageError(f"Cannot write to {folder}: {error.strerror}.") from None


def _save(folder: Path, made: Sequence[Any]) -> None:
    """Write a plan for each group, and say what comes next."""
    from reconciler import plan as plans
    from reconciler.fleet import groups

    for group in made:
        path = folder / groups.file_name(group)
        plans.write(path, group.dump(), private=True)
        accept = "".join(f" --accept {hazard}" for hazard in group.plan.hazards)
        accept += "".join(f" --attest {name}" for name in group.plan.attestations)
        aside(f"Saved {path}. Next, once you have read it (reconciler show {path}):")
        aside(f'  reconciler approve {path} --as NAME --reason "..."{accept}')


@fleet.command()
@click.argument("plan_files", metavar="PLAN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("fleet.yaml"),
    show_default=True,
    help="The file of the fleet: how to reach the targets, and the waves.",
)
@_choice_options
@_workers_option
@untested_option
@_output_options
@_out_option
@click.option(
    "--approval",
    "approval_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An approval (repeatable); without it, those beside each plan.",
)
@click.option("--initialize", is_flag=True, help="Targets may have their first apply of this name.")
@click.option(
    "--evidence",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the evidence of every target, new or empty; else below RECONCILER_EVIDENCE, or evidence/.",
)
@click.option("--key", type=click.Path(path_type=Path), help="The SSH key that signs for the evidence.")
@click.pass_context
def apply(ctx: click.Context, /, plan_files: tuple[Path, ...], **given: Any) -> None:  # noqa: ANN401 - as drift
    """Apply approved plans to their targets, wave after wave; the first failure ends it. Start again to resume.

    \b
    Examples:
      reconciler fleet apply plans/*.fleet.plan
      reconciler fleet apply plans/3f2a91c07be4.fleet.plan -f fleet.yaml --only shop-eu-1 --initialize
    """
    from reconciler import evidence as evidences
    from reconciler.errors import UsageError
    from reconciler.fleet import files, members, rollout, waves
    from reconciler.kept import signing
    from reconciler.plan import replace_file
    from reconciler.render.text import as_json

    found = files.load(given["file"])
    round_ = _Round("apply", found, given["workers"])
    place = given["evidence"] or evidence_parent() / evidences.default_name(round_.id, datetime.now(UTC))
    everyone = members.resolve(found)
    chosen = members.choose(everyone, given["select"], given["only"])
    order = rollout.Order(
        fleet=found,
        groups=[_approved(path, given["approval_files"]) for path in plan_files],
        initialize=given["initialize"],
        untested=given["allow_untested_server"],
        folder=place,
        sign=signing(given["key"]),
        settle_by=lambda member, folder: _settle(member, folder, untested=given["allow_untested_server"]),
    )
    group_of = rollout.targets(order, everyone)
    todo = [member for member in chosen if member.name in group_of]
    if not todo:
        raise UsageError("The plans are for none of these targets.")
    folder = evidences.Folder(place)
    progress = _Progress(len(todo))
    signal.signal(signal.SIGTERM, interrupt)
    done = rollout.run(
        order,
        todo,
        group_of,
        waves.assign(found.declared.waves, everyone),
        workers=round_.workers,
        told=progress,
        warned=_warned,
    )
    told = round_.report(done.results, interrupted=done.interrupted)
    if any(place.iterdir()):
        replace_file(place / "rollout.json", f"{as_json(told.dump())}\n".encode(), private=True)
        aside(f"Evidence: {place}")
    else:
        folder.give_back()
    code = _tell(given, told)
    if done.halted is not None:
        left = sum(one.state == "not_started" for one in told.targets)
        how = " with another --evidence" if given["evidence"] else ""
        aside(f"Stopped in wave {done.halted}; {left} not started. Put it right and start the same command again{how}.")
    ctx.exit(code)


def _approved(path: Path, named: tuple[Path, ...]) -> Any:  # noqa: ANN401 - an Approved, whose module is slow to import
    """A group with its approvals. Raises NotApproved where there is none."""
    from reconciler import approve as approvals
    from reconciler.errors import NotApproved
    from reconciler.fleet import groups, rollout

    group, _ = groups.load(path)
    files = named or approvals.all_beside(path)
    if not files:
        raise NotApproved(f"{path} is not approved.", hint=f"Run `reconciler approve {path}`, then apply again.")
    return rollout.Approved(group, [(approvals.load(file), file.read_bytes()) for file in files])


def _settle(member: Member, folder: Path, *, untested: bool) -> str:
    """What to type when the answer to a target's COMMIT was lost; never with its password."""
    from reconciler import pg

    words = ["reconciler", "settle", str(folder), "--dsn", pg.without_password(member.dsn)]
    return shlex.join([*words, *(["--allow-untested-server"] * untested)])


class _Round:
    """When a round began, and what it is called."""

    def __init__(self, command: Literal["drift", "plan", "apply"], found: Fleet, workers: int | None) -> None:
        self.id = str(uuid.uuid4())
        self.workers = workers or found.declared.workers
        self._command: Literal["drift", "plan", "apply"] = command
        self._fleet = found.name
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()

    def report(self, results: Sequence[TargetResult], *, interrupted: bool) -> FleetReport:
        """The round as a document."""
        from reconciler.fleet import report
        from reconciler.plan import stamp

        return report.assemble(
            self._command,
            self._fleet,
            self.id,
            results,
            started_at=stamp(self._started),
            finished_at=stamp(datetime.now(UTC)),
            workers=self.workers,
            seconds=time.monotonic() - self._clock,
            interrupted=interrupted,
        )


class _Progress:
    """A line on stderr for each target that is done."""

    def __init__(self, of: int) -> None:
        self._of = of
        self._number = 0
        self._started = time.monotonic()

    def __call__(self, member: Member, result: TargetResult) -> None:
        from reconciler.fleet.text import said
        from reconciler.render.text import printable

        self._number += 1
        seconds = time.monotonic() - self._started
        aside(printable(f"{seconds:6.1f} s  {self._number}/{self._of} {member.name}: {said(result)}"))


def _warned(under_way: int) -> None:
    aside(f"Interrupted: nothing new begins; {under_way} under way. Press Ctrl-C again to leave them.")


def _tell(given: Mapping[str, Any], found: FleetReport) -> int:
    """Print the report, or write it in the place of a file; the exit code."""
    from reconciler.fleet import text
    from reconciler.plan import replace_file
    from reconciler.render.text import as_json

    if given["out"] is not None:
        replace_file(given["out"], f"{as_json(found.dump())}\n".encode(), private=False)
    if given["form"] == "text":
        shown = text.report(found, colour=colour(given["no_color"]), verbose=given["verbose"])
        click.echo(shown, nl=False)
    elif given["out"] is None:
        print_json(found)
    sys.stdout.flush()
    return found.exit_code


def _queued(found: Fleet, chosen: Sequence[Member], given: Mapping[str, Any]) -> FleetReport:
    """Have the workers look, and wait until every target was looked at; Ctrl-C ends the waiting, not the round."""
    from reconciler import drift as drifting
    from reconciler import pg
    from reconciler.errors import UsageError
    from reconciler.fleet import queue, results

    round_id = str(uuid.uuid4())
    dsn: str = given["queue_dsn"]
    names = [(member.name, dict(member.labels)) for member in chosen]
    queue.begin(dsn, found.name, names, round_id, drifting.finding_codes(given["fail_on"]))
    aside(f"Round {round_id}: {len(chosen)} targets.")
    told = -1
    with pg.connect(dsn, "fleet") as conn:
        with suppress(KeyboardInterrupt):
            while (progress := results.progress(conn, round_id))[0] < progress[1]:
                if progress[0] != told:
                    told = progress[0]
                    aside(f"{told}/{progress[1]}")
                time.sleep(WAITS)
        report = results.last(conn, round_id=round_id)
    if report is None:
        raise UsageError(f"The round {round_id} was removed while it went on.")
    if report.finished_at is None:
        aside(f"The round goes on without us. Later: reconciler fleet status --round {round_id}")
    return report.model_copy(update={"interrupted": report.finished_at is None})


@fleet.command()
@_queue_option
@click.option("--print-sql", is_flag=True, help="Print the SQL instead of running it, for a DBA.")
def init(queue_dsn: str, print_sql: bool) -> None:
    """Make the schema of the queue and the results, once, in a database that is not governed.

    \b
    Examples:
      reconciler fleet init --queue "service=fleet"
      reconciler fleet init --queue "service=fleet" --print-sql | less
    """
    from reconciler.fleet import queue, results

    if print_sql:
        click.echo(queue.source(), nl=False)
        return
    queue.create(queue_dsn)
    aside(f"Made the schema {results.SCHEMA}: the rounds, their results and the queue.")


@fleet.command()
@_file_argument
@_queue_option
@_workers_option
@untested_option
@click.option("--fail-on", default="", help="For rounds of the schedule: findings or classes that also exit 2.")
@click.option(
    "--heartbeat", default="10s", show_default=True, metavar="DURATION", help="How often a worker says that it lives."
)
def worker(file: Path, **given: Any) -> None:  # noqa: ANN401 - as drift
    """Look at targets for the queue until Ctrl-C or SIGTERM, and begin the rounds of `schedule`.

    Any number of workers on any number of machines: each target is looked at once in a round, also when a worker is
    killed. Three heartbeats that did not come, and another worker takes over what it had.

    \b
    Examples:
      reconciler fleet worker --queue "service=fleet" fleet.yaml
      reconciler fleet worker --queue "service=fleet" fleet.yaml --workers 8 --heartbeat 5s
    """
    from reconciler import drift as drifting
    from reconciler.errors import UsageError
    from reconciler.fleet import files, queue
    from reconciler.model import milliseconds
    from reconciler.render.text import printable

    try:
        heartbeat = milliseconds(given["heartbeat"]) / 1000
    except ValueError as error:
        raise UsageError(f"--heartbeat: {error}.") from None
    found = files.load(file)
    queue.work(
        queue.Work(
            file=file,
            dsn=given["queue_dsn"],
            workers=given["workers"] or found.declared.workers,
            heartbeat=heartbeat,
            fail_on=drifting.finding_codes(given["fail_on"]),
            untested=given["allow_untested_server"],
            told=lambda line: aside(printable(f"{datetime.now(UTC).strftime('%Y-%m-%dT%H:%M:%SZ')} {line}")),
        ),
        found,
    )


@fleet.command()
@_queue_option
@click.option("--fleet", "name", metavar="NAME", help="The last round of this fleet; else of any.")
@click.option("--round", "round_id", metavar="ID", help="This round.")
@_output_options
@_out_option
@click.pass_context
def status(ctx: click.Context, /, **given: Any) -> None:  # noqa: ANN401 - as drift
    """Print the last round that the workers did, and which workers live. Exit code as that round's.

    \b
    Examples:
      reconciler fleet status --queue "service=fleet"
      reconciler fleet status --queue "service=fleet" --fleet shops --format json --out board.json
    """
    from reconciler import pg
    from reconciler.errors import UsageError
    from reconciler.fleet import results

    with pg.connect(given["queue_dsn"], "fleet status") as conn:
        found = results.last(conn, given["name"], given["round_id"])
        ages = results.workers(conn)
    if found is None:
        raise UsageError("There was no such round yet.", hint="reconciler fleet drift --queue DSN begins one.")
    beats = ", ".join(f"{age:.0f} s" for age in ages) or "none"
    aside(f"Workers and how long ago each was heard of: {beats}.")
    ctx.exit(_tell(given, found))


@fleet.command("report")
@_source_argument
@_results_option
@click.option("--fleet", "name", metavar="NAME", help="With --queue: the last round of this fleet; else of any.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Where to write the page.")
def report_(source: Path | None, queue_dsn: str | None, name: str | None, out: Path) -> None:
    """Write the board: every target of a round in one HTML file that searches, sorts and hides without a server.

    FILE is what `fleet drift --format json --out FILE` wrote; with --queue it is the last round of the workers.

    \b
    Examples:
      reconciler fleet report drift.json --out board.html
      reconciler fleet report --queue "service=fleet" --fleet shops --out board.html
    """
    from reconciler import plan as plans
    from reconciler.fleet import board

    page = board.html(_reading(source, queue_dsn, name)(), datetime.now(UTC))
    plans.replace_file(out, page.encode("utf-8", "backslashreplace"), private=False)
    aside(f"Written: {out}")


@click.command()
@_source_argument
@_results_option
@click.option("--fleet", "name", metavar="NAME", help="With --queue: the last round of this fleet; else of any.")
@click.option("--listen", default="127.0.0.1:9188", show_default=True, metavar="HOST:PORT", help="Where to listen.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file with the token that whoever asks must have; else RECONCILER_TOKEN. Only loopback goes without.",
)
@click.option("--refresh", default="15s", show_default=True, metavar="DURATION", help="How often the page asks again.")
def serve(source: Path | None, queue_dsn: str | None, name: str | None, **given: Any) -> None:  # noqa: ANN401 - as drift
    """Show the board of a fleet to browsers, always as it is now. Reads only.

    FILE is what `fleet drift --format json --out FILE` writes, again and again; with --queue it is the last round of
    the workers.

    \b
    Examples:
      reconciler serve --queue "service=fleet"
      reconciler serve drift.json --listen 0.0.0.0:9188 --token-file /run/secrets/board
    """
    from reconciler import web
    from reconciler.errors import UsageError
    from reconciler.fleet import serve as serving
    from reconciler.model import milliseconds

    place = web.address(given["listen"])
    token = _token(given["token_file"])
    if token is None and not web.is_loopback(place[0]):
        raise UsageError(
            f"--listen {given['listen']}: others than this machine reach that.",
            hint="Give a token: --token-file FILE, or RECONCILER_TOKEN.",
        )
    try:
        refresh = max(1, milliseconds(given["refresh"]) // 1000)
    except ValueError as error:
        raise UsageError(f"--refresh {given['refresh']}: {error}.") from None
    found = serving.Source(_reading(source, queue_dsn, name), keep=min(refresh, 5))
    signal.signal(signal.SIGTERM, interrupt)
    with web.serving(place, serving.pages(found, web.Guard(token), refresh)) as (host, port):
        shown = f"[{host}]" if ":" in host else host
        aside(f"The board is at http://{shown}:{port}/ (Ctrl-C ends it).")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


def _token(file: Path | None) -> str | None:
    """What stands in the file, or in the environment. Raises UsageError."""
    from reconciler.errors import UsageError

    text = os.environ.get("RECONCILER_TOKEN")
    where = "RECONCILER_TOKEN"
    if file is not None:
        where = str(file)
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise UsageError(f"Cannot read the token from {file}: {reason}.") from None
    if text is None:
        return None
    if len(text.strip()) < SHORTEST_TOKEN:
        raise UsageError(
            f"{where}: a token has at least {SHORTEST_TOKEN} characters.", hint="Make one: openssl rand -hex 32"
        )
    return text.strip()


def _reading(source: Path | None, queue_dsn: str | None, name: str | None) -> Callable[[], FleetReport]:
    """How the newest report is read. Raises UsageError when nothing says where from, or two things do."""
    from reconciler import pg
    from reconciler.errors import UsageError
    from reconciler.fleet import report, results

    if source is not None:
        return lambda: report.load(source)
    if queue_dsn is None:
        raise UsageError("Give the FILE of a report, or --queue DSN.")

    def read() -> FleetReport:
        with pg.connect(queue_dsn, "fleet report") as conn:
            found = results.last(conn, name)
        if found is None:
            raise UsageError("There was no such round yet.", hint="reconciler fleet drift --queue DSN begins one.")
        return found

    return read
