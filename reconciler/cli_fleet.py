"""Below `cli`: the commands `reconciler fleet ...`. As there: parse -> call -> render -> exit code, and no rule.

Modules that are slow to import are imported by the command that uses them.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
import uuid
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
    from collections.abc import Mapping, Sequence

    from reconciler.fleet.files import Fleet, Member
    from reconciler.fleet.report import FleetReport, TargetResult

FORMATS = ("text", "json")


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
@click.pass_context
def plan(ctx: click.Context, /, file: Path, **given: Any) -> None:  # noqa: ANN401 - as drift
    """Plan every target; those with the same changes from the same state are one group and take one approval.

    \b
    Examples:
      reconciler fleet plan
      reconciler fleet plan fleet.yaml --select region=eu --out plans --detailed-exitcode
    """
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
                click.echo(text.plan(group.plan, colour=colour(given["no_color"]), verbose=False), nl=False)
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
        aside(f"Stopped in wave {done.halted}; {left} not started. Put it right and start the same command again.")
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
        self._command = command
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

    def __call__(self, member: Member, result: TargetResult) -> bool:
        from reconciler.fleet.text import said
        from reconciler.render.text import printable

        self._number += 1
        seconds = time.monotonic() - self._started
        aside(printable(f"{seconds:6.1f} s  {self._number}/{self._of} {member.name}: {said(result)}"))
        return True


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
    raise NotImplementedError
