"""The edge to people and programs: parse -> call -> render -> exit code. No SQL and no rule lives here.

Modules that are slow to import are imported by the command that uses them, so that `--help` stays quick.
"""

from __future__ import annotations

import itertools
import shlex
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from reconciler import __version__
from reconciler.cli_edges import F, untested_option
from reconciler.cli_edges import aside as _aside
from reconciler.cli_edges import colour as _colour
from reconciler.cli_edges import evidence_parent as _evidence_parent
from reconciler.cli_edges import ignore_signals as _ignore_signals
from reconciler.cli_edges import interrupt as _interrupt
from reconciler.cli_edges import options_for as _options_for
from reconciler.cli_edges import print_json as _json
from reconciler.cli_fleet import fleet, serve
from reconciler.errors import InputError, Interrupted, ReconcilerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reconciler.drift import DriftReport
    from reconciler.fleet.groups import Group
    from reconciler.look import Look
    from reconciler.model import Approval, Desired, Model, Plan, Target

FORMATS = ("text", "json")
REPORTS = (*FORMATS, "markdown", "html")
DRIFT_REPORTS = (*REPORTS, "prometheus", "junit")


def _state_option(command: F) -> F:
    return click.option(
        "-s",
        "--state",
        type=click.Path(path_type=Path),
        default=Path("state"),
        show_default=True,
        help="Directory with the desired state.",
    )(command)


def _target_option(command: F) -> F:
    return click.option("-t", "--target", help="A name of governance.targets; the only one is the default.")(command)


def _server_options(command: F) -> F:
    return click.option(
        "--dsn",
        envvar="RECONCILER_DSN",
        help="libpq connection string or URI; else RECONCILER_DSN, else libpq's PG* variables and service files.",
    )(untested_option(command))


def _output_options(command: F) -> F:
    return _options_for(command, FORMATS)


def _report_options(command: F) -> F:
    return _options_for(command, REPORTS)


def _drift_options(command: F) -> F:
    return _options_for(command, DRIFT_REPORTS)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="reconciler")
def cli() -> None:
    """Compare a PostgreSQL control plane with its declared state; plan, approve, apply, watch for drift.

    Exit codes: 0 done or no changes, 1 error, 2 changes pending or drift, 3 an invariant is violated or not judged, or
    a proof failed, 4 refused (stale, not approved, locked), 5 outcome unknown (ask with settle).
    """


cli.add_command(fleet)
cli.add_command(serve)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("state"))
def init(directory: Path) -> None:
    """Write a commented state DIRECTORY to start from.

    \b
    Examples:
      reconciler init
      reconciler init governance/state
    """
    from reconciler import scaffold

    for path in scaffold.write(directory):
        click.echo(path)
    click.echo(f"Next: edit {directory}/governance.yaml, then reconciler validate -s {directory}", err=True)


@cli.command()
@_state_option
@_target_option
@_output_options
def validate(state: Path, target: str | None, form: str, no_color: bool, verbose: bool) -> None:
    """Check everything that can be checked without a database.

    \b
    Examples:
      reconciler validate
      reconciler validate -s governance/state -t production
    """
    from reconciler import desired
    from reconciler.render import text

    del no_color
    found = [desired.load(state, target)] if target else desired.load_all(state)
    if form == "json":
        _json({"format_version": "1.0", "outcome": "no_changes", "errors": []})
        return
    for one in found:
        declared = f"{text.count(len(one.items), 'object')}, {text.count(len(one.checks), 'check')}"
        click.echo(f"{one.name} {one.release}, target {one.target}: {declared}.")
    if verbose:
        for item in found[0].items.values():
            if not getattr(item.rules, "checked_offline", True):
                click.echo(f"{item.address}: its body names types that only the server knows; checked at apply.")
    click.echo("The state is valid.")


@cli.command()
def schema() -> None:
    """Print the JSON Schema of state files, for editors.

    \b
    Examples:
      reconciler schema > state/schema.json
      reconciler schema | jq '.properties | keys'
    """
    from reconciler import desired

    _json(desired.schema())


@cli.command()
@_state_option
@_target_option
@_server_options
@_report_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Save the plan, for approve and apply.")
@click.option(
    "--live",
    "snapshot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Plan from what `reconciler snapshot` saved, without a database; apply looks at the database all the same.",
)
@click.option(
    "--key", type=click.Path(path_type=Path), help="Sign the saved plan, so that its author may not approve it."
)
@click.option("--as", "author", metavar="NAME", help="For --key: who makes the plan.")
@click.option("--detailed-exitcode", is_flag=True, help="Exit 2 when there are changes.")
@click.option(
    "--template",
    type=click.Path(path_type=Path, dir_okay=False),
    help="For --format markdown: a Jinja file that puts the parts of the comment together.",
)
@click.option("--artefact", default="", metavar="URL", help="For --format markdown: where the whole plan lies.")
@click.option("--show-values", is_flag=True, help="Print values that declared queries gave; only for trusted runs.")
@click.pass_context
def plan(ctx: click.Context, /, **given: Any) -> None:  # noqa: ANN401 - click hands over options of every type
    """Show what would change. Reads only: one read-only transaction, rolled back.

    \b
    Examples:
      reconciler plan --dsn postgresql://planner@db/app -t production
      reconciler plan --out phase2.plan --detailed-exitcode
      reconciler plan --live production.snapshot --format markdown
    """
    from reconciler import approve as approvals
    from reconciler import desired, look, survey
    from reconciler import plan as plans
    from reconciler.errors import UsageError
    from reconciler.render import comment, text

    if bool(given["key"]) != bool(given["author"]) or (given["key"] and not given["out"]):
        raise UsageError("A plan is signed with --key FILE, --as NAME and --out FILE together.")
    wanted = survey.taken(desired.load(given["state"], given["target"]))
    now = datetime.now(UTC)
    if given["snapshot"]:
        if ctx.get_parameter_source("dsn") is click.core.ParameterSource.COMMANDLINE:
            raise UsageError("A plan is made from --live or from --dsn, not from both.")
        seen = survey.load(given["snapshot"])
        made = look.plan_of(survey.recalled(seen, wanted), now).model_copy(update={"snapshot_of": seen.taken_at})
    else:
        made = look.planned(given["dsn"], wanted, allow_untested=given["allow_untested_server"], now=now)
    shown = made if given["show_values"] else plans.masked(made)
    if given["form"] == "text":
        click.echo(text.plan(shown, colour=_colour(given["no_color"]), verbose=given["verbose"]), nl=False)
    elif given["form"] == "markdown":
        file = given["out"].name if given["out"] else "PLAN"
        made_of = {"artefact": given["artefact"], "template": given["template"]}
        click.echo(comment.plan(shown, file=shlex.quote(file), **made_of), nl=False)
    else:
        _document(shown, given["form"], "plan")
    if made.blocking:
        if given["out"]:
            click.echo(f"Not written: {given['out']}. An invariant blocks this plan.", err=True)
        ctx.exit(3)
    if given["out"]:
        _save(approvals.sign_plan(made, given["author"], given["key"]) if given["key"] else made, given["out"])
    ctx.exit(2 if made.has_changes and given["detailed_exitcode"] else 0)


def _save(made: Plan, out: Path) -> None:
    """Write the plan, and say what comes next."""
    from reconciler import plan as plans

    plans.write(out, made.dump(), private=True)
    if made.has_changes:
        accept = "".join(f" --accept {hazard}" for hazard in made.hazards)
        accept += "".join(f" --attest {name}" for name in made.attestations)
        click.echo(f"Saved {out}. Next, once you have read it:", err=True)
        click.echo(f'  reconciler approve {out} --as NAME --reason "..."{accept}', err=True)


@cli.command()
@_state_option
@_target_option
@_server_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Where to save it.")
def snapshot(state: Path, target: str | None, dsn: str | None, allow_untested_server: bool, out: Path) -> None:
    """Save the live state as it was read, for `plan --live` where a runner cannot reach the database. Reads only.

    No secret and no answer of a declared query is in it.

    \b
    Examples:
      reconciler snapshot --out production.snapshot --dsn postgresql://planner@db/app -t production
      reconciler snapshot --out /srv/artefacts/production.snapshot
    """
    from reconciler import desired, pg, survey
    from reconciler import plan as plans

    wanted = survey.taken(desired.load(state, target))
    with pg.connect(dsn, "snapshot") as conn:
        pg.check_version(conn, allow_untested=allow_untested_server)
        with pg.snapshot(conn):
            made = survey.take(conn, wanted, datetime.now(UTC))
    plans.write(out, made.dump(), private=True)
    click.echo(f"Saved {out}, as of {made.taken_at}. Next: reconciler plan --live {out}", err=True)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@_report_options
def show(file: Path, form: str, no_color: bool, verbose: bool) -> None:
    """Print a saved plan, an approval or the evidence of a run again: a FILE, or the folder of the evidence.

    \b
    Examples:
      reconciler show phase2.plan
      reconciler show phase2.plan.operator.approval.json --format json
      reconciler show evidence/20260522T120000Z-1f0c9a52-... --format html > report.html
    """
    from reconciler import approve as approvals
    from reconciler import evidence as evidences
    from reconciler import plan as plans
    from reconciler.fleet import groups
    from reconciler.render import text
    from reconciler.trust import check_plan

    document = {} if file.is_dir() else plans.read(file, "plan, approval or evidence")
    if groups.is_one(document):
        group = groups.judged(file, document)
        _show_group(group, form, colour=_colour(no_color), verbose=verbose)
        return
    if file.is_dir() or evidences.is_evidence(document):
        kept = evidences.load(file)
        given, sort, shown = kept, "evidence", text.evidence(kept, colour=_colour(no_color), verbose=verbose)
    elif "approver" in document:
        approval = approvals.load(file)
        given, sort, shown = approval, "approval", text.approval(approval, colour=_colour(no_color))
    else:
        made, _ = plans.load(file)
        check_plan(made)
        given, sort, shown = made, "plan", text.plan(made, colour=_colour(no_color), verbose=verbose)
    if form == "text":
        click.echo(shown, nl=False)
    else:
        _document(given, form, sort)


def _show_group(group: Group, form: str, *, colour: bool, verbose: bool) -> None:
    """A plan for several targets: the list, and the plan of the first of them."""
    from reconciler.fleet import text as fleets
    from reconciler.render import text

    if form == "json":
        _json(group)
    elif form == "text":
        click.echo(fleets.listing(group), nl=False)
        click.echo(text.plan(group.plan, colour=colour, verbose=verbose), nl=False)
    else:
        _document(group.plan, form, "plan")


@cli.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--as", "approver", required=True, metavar="NAME", help="Who approves: a principal of the list.")
@click.option(
    "--key", type=click.Path(path_type=Path), help="The SSH key that signs: a private one, or one of an agent."
)
@click.option("--break-glass", is_flag=True, help="An emergency: alone, if the installed policy lets you.")
@click.option("--reason", required=True, help="Why.")
@click.option("--accept", "accepted", multiple=True, metavar="HAZARD", help="A hazard of the plan; each must be named.")
@click.option("--attest", "attested", multiple=True, metavar="ID", help="What no query can see and you sign for.")
@click.option(
    "--expires", metavar="DURATION", help="For how long, for example 2h; at most (and by default) the policy's."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Where to write the approval.")
@_output_options
def approve(plan_file: Path, **given: Any) -> None:  # noqa: ANN401 - as plan
    """Approve exactly the effects of a saved PLAN. Needs no database.

    \b
    Examples:
      reconciler approve phase2.plan --as operator --key ~/.ssh/id_ed25519 --reason "change 4711" --accept arms_gate
      reconciler approve phase2.plan --as operator --reason "tonight" --expires 2h --out tonight.approval.json
    """
    from reconciler import approve as approvals
    from reconciler import plan as plans
    from reconciler.fleet import groups
    from reconciler.model import digest
    from reconciler.render import text

    document = plans.read(plan_file, "plan")
    group = groups.judged(plan_file, document) if groups.is_one(document) else None
    made, checksum = (group.plan, digest(document)) if group is not None else plans.load(plan_file)
    approval = approvals.approve(
        made,
        checksum,
        listed=None if group is None else group.listed,
        approver=given["approver"],
        reason=given["reason"],
        accepted=given["accepted"],
        attested=given["attested"],
        expires=given["expires"],
        now=datetime.now(UTC),
        key=given["key"],
        break_glass=given["break_glass"],
    )
    out = given["out"] or approvals.beside(plan_file, approval.approver)
    plans.write(out, approval.dump())
    if given["form"] == "json":
        _json(approval)
    else:
        click.echo(text.approval(approval, colour=_colour(given["no_color"])), nl=False)
    needed = 1 if approval.break_glass else approvals.judging(made)[0].approval.needed(made.hazards)
    there = f"; the plan needs {needed} approvals, {len(approvals.all_beside(plan_file))} lie beside it" * (needed > 1)
    click.echo(f"Saved {out}{there}. Next: reconciler {'fleet ' * (group is not None)}apply {plan_file}", err=True)


@cli.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@_target_option
@_server_options
@_output_options
@click.option(
    "--approval",
    "approval_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An approval (repeatable); without it, those beside the plan.",
)
@click.option("--initialize", is_flag=True, help="This is the first apply of this name on this database.")
@click.option(
    "--rehearsal",
    "rehearsal_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What `prove --rehearse --out` saved for this plan: proofs that no apply plays are then told as rehearsed.",
)
@click.option(
    "--evidence",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the evidence, new or empty; else <UTC time>-<run> below RECONCILER_EVIDENCE, else evidence/.",
)
@click.option("--key", type=click.Path(path_type=Path), help="The SSH key that signs for the evidence.")
@click.pass_context
def apply(ctx: click.Context, plan_file: Path, **given: Any) -> None:  # noqa: ANN401 - as plan
    """Apply an approved PLAN in one transaction, or change nothing.

    \b
    Examples:
      reconciler apply phase2.plan --dsn postgresql://operator@db/app --initialize
      reconciler apply phase2.plan --approval a.approval.json --approval b.approval.json --evidence run-4711
      reconciler apply phase2.plan --rehearsal phase2.rehearsal.json --key ~/.ssh/id_ed25519
    """
    from reconciler import apply as applying
    from reconciler import approve as approvals
    from reconciler import carried
    from reconciler import evidence as evidences
    from reconciler import kept as keeping
    from reconciler import plan as plans
    from reconciler.render import text
    from reconciler.trust import check_plan

    made, checksum = plans.load(plan_file)
    colour = _colour(given["no_color"])
    if not made.has_changes:
        if given["form"] == "json":
            _json({"format_version": made.format_version, "outcome": "no_changes"})
        else:
            click.echo(text.plan_line(made))
        return
    files = given["approval_files"] or approvals.all_beside(plan_file)
    loaded = [approvals.load(path) for path in files]
    if not loaded:
        check_plan(made)
        loaded = _ask(made, checksum, colour=colour)
    request = applying.Request(
        dsn=given["dsn"],
        plan=made,
        approvals=loaded,
        target=given["target"],
        initialize=given["initialize"],
        allow_untested=given["allow_untested_server"],
        rehearsal=carried.load(given["rehearsal_file"]) if given["rehearsal_file"] else None,
    )
    place = given["evidence"] or _evidence_parent() / evidences.default_name(request.run_id, datetime.now(UTC))
    request = replace(request, settle_by=_settle_command(ctx, place), folder=place)
    kept = keeping.Kept(
        evidences.Folder(place),
        made,
        checksum,
        plan_file.read_bytes(),
        [
            (approval.approver, path.read_bytes() if path else plans.serialize(approval.dump()))
            for approval, path in itertools.zip_longest(loaded, files)
        ],
        plans.serialize(request.rehearsal.dump()) if request.rehearsal else None,
        keeping.signing(given["key"]),
        lambda: _aside(f"Evidence: {place}"),
    )
    record = applying.Record(_Progress(verbose=given["verbose"]))
    # A polite kill rolls back like Ctrl-C does; a kill -9 leaves it to the server.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        done = applying.apply(request, record)
    except (ReconcilerError, KeyboardInterrupt) as raised:
        _ignore_signals()
        error = record.interrupted(request) if isinstance(raised, KeyboardInterrupt) else raised
        done = record.failed(request, error)
        if not record.committed:
            if record.begun:
                for problem in kept.write(done, None):
                    _aside(problem)
            else:
                kept.folder.give_back()
            raise error from raised
    _ignore_signals()
    done = done.model_copy(update={"problems": (*done.problems, *kept.write(done, record.entry))})
    try:
        if given["form"] == "json":
            _json(done)
        else:
            click.echo(text.outcome(done, colour=colour), nl=False)
        sys.stdout.flush()
    except OSError:
        # It is committed: that nobody could read so must not look like a failure.
        sys.stdout = None
    ctx.exit(0)


@cli.command()
@click.argument("run", metavar="EVIDENCE", type=click.Path(path_type=Path))
@_server_options
@_output_options
@click.option("--key", type=click.Path(path_type=Path), help="The SSH key that signs for the evidence.")
@click.pass_context
def settle(ctx: click.Context, run: Path, **given: Any) -> None:  # noqa: ANN401 - as plan
    """Find out what became of a run whose answer to COMMIT was lost (apply exited 5), and complete its EVIDENCE.

    EVIDENCE is the folder that the run left, or the run's id when the folder is where apply puts it. Only reads the
    database, and can be repeated. Exit codes: 0 it was committed, 1 it was rolled back and nothing was changed (apply
    again), 5 nobody can say yet (ask again later).

    \b
    Examples:
      reconciler settle evidence/20260522T120000Z-1f0c9a52-... --dsn postgresql://operator@db/app
      reconciler settle 1f0c9a52-6d0e-4a8e-9a43-0d6c3f0b3a11 --format json
    """
    from reconciler import evidence as evidences
    from reconciler import plan as plans
    from reconciler import settle as settling
    from reconciler.kept import signing
    from reconciler.render import html, markdown, text

    place = evidences.find(run, _evidence_parent())
    kept = evidences.load(place)
    if kept.outcome == "unknown":
        made, _ = plans.load(place / "plan.json")
        kept, entry = settling.resolve(
            given["dsn"],
            kept,
            made,
            command=_settle_command(ctx, place),
            allow_untested=given["allow_untested_server"],
        )
        pages = {"report.md": markdown.evidence(kept), "report.html": html.evidence(kept)}
        evidences.complete(place, kept, entry, pages, signing(given["key"]))
        click.echo(f"Evidence: {place}", err=True)
    else:
        click.echo("Nothing to settle: the evidence says what became of the run.", err=True)
    if given["form"] == "json":
        _json(kept)
    else:
        colour = _colour(given["no_color"])
        click.echo(text.evidence(kept, colour=colour, verbose=given["verbose"]), nl=False)
    ctx.exit(0 if kept.outcome == "applied" else 1)


def _settle_command(ctx: click.Context, place: Path) -> str:
    """What to type when the answer to COMMIT is lost: with the server as it was given here, but never its password."""
    from reconciler import pg

    words = ["reconciler", "settle", str(place)]
    if ctx.get_parameter_source("dsn") == click.core.ParameterSource.COMMANDLINE:
        words += ["--dsn", pg.without_password(ctx.params["dsn"])]
    if ctx.params["allow_untested_server"]:
        words.append("--allow-untested-server")
    return shlex.join(words)


def _ask(made: Plan, checksum: str, *, colour: bool) -> list[Approval]:
    """On a terminal, and where the policy takes unsigned approvals, the person who applies may approve by `yes`."""
    import getpass

    from reconciler import approve as approvals
    from reconciler.errors import NotApproved
    from reconciler.render import text

    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise NotApproved("The plan is not approved.", hint="Run `reconciler approve PLAN`, then apply again.")
    click.echo(text.plan(made, colour=colour, verbose=False), err=True)
    click.echo("Do you want to perform these actions?", err=True)
    click.echo("  reconciler will perform the actions described above, and you accept their hazards.", err=True)
    click.echo("  Only 'yes' will be accepted to approve.\n", err=True)
    answer = click.prompt("  Enter a value", default="", show_default=False, err=True)
    if answer != "yes":
        raise NotApproved("Not approved: the answer was not 'yes'.", hint="Nothing was changed.")
    return [
        approvals.approve(
            made,
            checksum,
            approver=getpass.getuser(),
            reason="typed yes at the prompt of apply",
            accepted=made.hazards,
            attested=made.attestations,
            expires=None,
            now=datetime.now(UTC),
        )
    ]


def _faults_tried(done: int, of: int, survivors: int) -> None:
    """On a terminal one line that is written over, elsewhere one for every hundred."""
    terminal = sys.stderr.isatty()
    if terminal or done % 100 == 0 or done == of:
        click.echo(
            f"{chr(13) if terminal else ''}{done} of {of} faults tried, {survivors} not noticed so far",
            err=True,
            nl=not terminal or done == of,
        )


class _Progress:
    """Progress of an apply on stderr: stages and objects, with the seconds since the start."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._started = datetime.now(UTC)
        self._last = ""

    def __call__(self, stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        if detail == self._last and not self._verbose and number < of:
            return  # one line for each object, not for each of its statements
        self._last = detail
        seconds = (datetime.now(UTC) - self._started).total_seconds()
        count = f" {number}/{of}" if of else ""
        _aside(f"{seconds:6.1f} s  {stage}{count}{': ' + detail if detail else ''}")


@cli.command()
@_state_option
@_target_option
@_server_options
@_drift_options
@click.option(
    "--fail-on", default="", help="Findings or classes that also exit 2, for example undeclared,stale_heartbeat."
)
@click.option("--to-state", is_flag=True, help="Write what drifted into the files, for a pull request that accepts it.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the report here, whole or not at all."
)
@click.option(
    "--notify",
    metavar="URL",
    envvar="RECONCILER_NOTIFY_URL",
    help="Post the report as JSON (Slack reads its text); also RECONCILER_NOTIFY_URL, which other users do not see.",
)
@click.option("--notify-required", is_flag=True, help="Exit 1 when the report could not be posted.")
@click.option(
    "--every", metavar="DURATION", help="Look again and again, for example 5m (at least 1s), until Ctrl-C or SIGTERM."
)
@click.option("--listen", metavar="HOST:PORT", help="With --every: answer /metrics and /healthz, as 127.0.0.1:9187.")
@click.pass_context
def drift(ctx: click.Context, /, **given: Any) -> None:  # noqa: ANN401 - as plan
    """Compare live with last applied (drift) and with the files (pending). Reads only.

    \b
    Examples:
      reconciler drift --dsn postgresql://planner@db/app -t production
      reconciler drift --format json --fail-on undeclared,stale_heartbeat
      reconciler drift --to-state && git diff state
      reconciler drift --every 5m --listen 127.0.0.1:9187
      reconciler drift --format prometheus --out /var/lib/node_exporter/reconciler.prom
    """
    from reconciler import accept, desired, notify
    from reconciler import drift as drifting
    from reconciler.survey import taken

    fail_on = drifting.finding_codes(given["fail_on"])
    every = _drift_usage(given)
    if every is not None:
        _watch(given, fail_on, every)
        return
    wanted = taken(desired.load(given["state"], given["target"]))
    try:
        seen = _look(given, wanted, fail_on)
    except ReconcilerError as error:
        _not_checked(given, wanted, error)
        raise
    report = seen.report
    if given["to_state"]:
        written = accept.to_state(given["state"], wanted, seen.survey.live, seen.survey.last.manifest, report.items)
        report = report.model_copy(update={"accepted": written})
    _tell(given, report)
    if not _posted(given, notify.of_report(report)):
        ctx.exit(1)
    ctx.exit(drifting.exit_code(report))


def _drift_usage(given: Mapping[str, Any]) -> float | None:
    """Do the options go together? The seconds of --every, if it is given."""
    from reconciler import notify, watch
    from reconciler.errors import UsageError
    from reconciler.model import milliseconds

    if given["notify"]:
        notify.check(given["notify"])
    elif given["notify_required"]:
        raise UsageError("--notify-required needs a URL.", hint="Name it with --notify or RECONCILER_NOTIFY_URL.")
    if given["every"] is None:
        if given["listen"]:
            raise UsageError("--listen answers while drift looks again and again.", hint="Add --every 5m.")
        return None
    if given["to_state"]:
        raise UsageError("--to-state writes once, for a review.", hint="Leave --every away.")
    try:
        every = milliseconds(given["every"]) / 1000
    except ValueError as error:
        raise UsageError(f"--every: {error}.") from None
    if every < watch.SHORTEST:
        raise UsageError(f"--every {given['every']} is too often.", hint="Once a second is the most.")
    return every


def _look(given: Mapping[str, Any], wanted: Desired, fail_on: frozenset[str]) -> Look:
    from reconciler.look import look

    untested: bool = given["allow_untested_server"]
    return look(given["dsn"], wanted, fail_on=fail_on, allow_untested=untested, now=datetime.now(UTC))


def _tell(given: Mapping[str, Any], report: DriftReport) -> None:
    """Print the report, or write it in the place of a file."""
    import importlib

    from reconciler.render import text

    form = given["form"]
    if form == "text":
        colour = _colour(given["no_color"]) and given["out"] is None
        shown = text.drift(report, colour=colour, verbose=given["verbose"])
    elif form == "json":
        shown = f"{text.as_json(report.dump())}\n"
    else:
        shown = importlib.import_module(f"reconciler.render.{form}").drift(report)
    _put(given, shown)


def _put(given: Mapping[str, Any], shown: str) -> None:
    from reconciler.plan import replace_file

    if given["out"] is None:
        click.echo(shown, nl=False)
        sys.stdout.flush()
    else:
        replace_file(given["out"], shown.encode("utf-8", "backslashreplace"), private=False)


def _not_checked(given: Mapping[str, Any], wanted: Desired, error: ReconcilerError) -> None:
    """Nobody could look: metrics that are read from a file say so, and so does who is to be notified."""
    from reconciler import notify
    from reconciler.plan import stamp
    from reconciler.render import prometheus

    if given["form"] == "prometheus" and given["out"] is not None:
        before = ""
        with suppress(OSError):
            before = given["out"].read_text("utf-8", "replace")
        _put(given, prometheus.not_checked(wanted.name, wanted.target, before))
    _posted(given, notify.of_error(wanted.name, wanted.target, error, stamp(datetime.now(UTC))))


def _posted(given: Mapping[str, Any], document: dict[str, Any]) -> bool:
    """Post it, if there is somewhere to post it to. False when that failed and was required."""
    import time

    from reconciler import notify

    if not given["notify"]:
        return True
    try:
        notify.post(given["notify"], document, sleep=time.sleep)
    except notify.NotNotified as error:
        _aside(f"Warning: {error.message}")
        return not given["notify_required"]
    return True


def _watch(given: Mapping[str, Any], fail_on: frozenset[str], every: float) -> None:
    """Look again and again; each round reads the files anew and has a connection of its own."""
    from contextlib import ExitStack

    from reconciler import desired, notify, watch, web
    from reconciler.render import prometheus
    from reconciler.render.text import printable
    from reconciler.survey import taken

    wanted = desired.load(given["state"], given["target"])
    last: list[DriftReport] = []
    up = False

    def once() -> None:
        nonlocal wanted, up
        wanted = taken(desired.load(given["state"], given["target"]))
        report = _look(given, wanted, fail_on).report
        last[:], up = [report], True
        _tell(given, report)
        _posted(given, notify.of_report(report))

    def failed(error: ReconcilerError) -> None:
        nonlocal up
        up = False
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        _aside(printable(f"{now} Not checked: {error.message}"))
        for line in error.details:
            _aside(printable(f"  {line}"))
        try:
            _not_checked(given, wanted, error)
        except ReconcilerError as another:
            _aside(f"Warning: {another.message}")

    def missed(number: int) -> None:
        _aside(f"Missed {number} round{'' if number == 1 else 's'}: a look took longer than {given['every']}.")

    loop = watch.Loop(every, once, failed, missed)

    def metrics() -> str:
        known = prometheus.of_report(last[0], current=up) if last else prometheus.down(wanted.name, wanted.target)
        counters = {
            "reconciler_rounds_total": ("Rounds begun.", loop.rounds),
            "reconciler_rounds_failed_total": ("Rounds in which nobody could look.", loop.failures),
            "reconciler_rounds_missed_total": ("Rounds left out because one took too long.", loop.skipped),
        }
        return prometheus.page([*known, *prometheus.of_loop(wanted.name, wanted.target, counters)])

    signal.signal(signal.SIGTERM, _interrupt)
    with ExitStack() as stack:
        if given["listen"]:
            place = web.address(given["listen"])
            host, port = stack.enter_context(web.serving(place, watch.pages(metrics, lambda: loop.health)))
            shown = f"[{host}]" if ":" in host else host
            _aside(f"Listening on http://{shown}:{port}/metrics and /healthz.")
            if not web.is_loopback(host):
                _aside("Warning: everybody who reaches this address can read the names of what is governed.")
        loop.run()
        _ignore_signals()
    _aside("Stopped.")


@cli.command()
@_state_option
@_target_option
@_server_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Where to write; pins.yaml of the state.")
def pin(state: Path, target: str | None, dsn: str | None, allow_untested_server: bool, out: Path | None) -> None:
    """Capture the live definitions of everything that `pin` invariants name, for review. Reads only.

    \b
    Examples:
      reconciler pin --dsn postgresql://planner@db/app -t production
      reconciler pin --out new-pins.yaml && diff state/pins.yaml new-pins.yaml
    """
    from reconciler import desired, live, pg, pins

    wanted = desired.load(state, target, capturing=True)
    with pg.connect(dsn, "pin") as conn:
        pg.check_version(conn, allow_untested=allow_untested_server)
        with pg.snapshot(conn):
            live.identify(conn, wanted)
            text, count = pins.capture(conn, wanted)
    written = out or state / "pins.yaml"
    pins.write(written, text)
    click.echo(
        f"Captured {count} pin{'' if count == 1 else 's'} in {written}. Review it like any other change.", err=True
    )


@cli.command()
@click.argument("entry")
@_state_option
@_target_option
@_server_options
@_report_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Where to save the plan that undoes it.")
@click.option("--prove", is_flag=True, help="ENTRY is a saved plan: apply and revert it, roll back, say what remains.")
@click.pass_context
def revert(ctx: click.Context, /, entry: str, **given: Any) -> None:  # noqa: ANN401 - as plan
    """Make the plan that undoes an ENTRY of the ledger, given by its number. Approve and apply it like any other.

    With --prove nothing was applied yet: the saved plan ENTRY is applied and reverted in a transaction that is rolled
    back, and what would not be as before is named.

    \b
    Examples:
      reconciler revert 12 --out undo.plan --dsn postgresql://operator@db/app -t production
      reconciler revert --prove phase2.plan --dsn postgresql://operator@db/app
    """
    if given["prove"]:
        ctx.exit(_prove_revert(Path(entry), given))
    from reconciler import capabilities, desired, drift, ledger, live, obstacles, pg
    from reconciler import revert as undoing
    from reconciler.errors import UsageError
    from reconciler.render import text
    from reconciler.survey import survey

    if not entry.isdecimal() or given["out"] is None:
        raise UsageError(
            "revert needs the number of a ledger entry, and --out for the plan that undoes it.",
            hint="Plans and evidence name the entry; `reconciler revert 12 --out undo.plan`.",
        )
    number = int(entry)
    files = desired.load(given["state"], given["target"])
    with pg.connect(given["dsn"], "revert") as conn:
        pg.check_version(conn, allow_untested=given["allow_untested_server"])
        with pg.snapshot(conn):
            last = ledger.last(conn, files.name)
            ledger.check_named(files, last, live.identify(conn, files))
            undone = ledger.numbered(conn, files.name, number)
            if undone is None or last.entry is None:
                known = f"they go from 1 to {last.entry.number}" if last.entry else "there are none"
                raise UsageError(f"{files.name} has no ledger entry {entry} on this database; {known}.")
            before = ledger.numbered(conn, files.name, number - 1)
            wanted = undoing.declarations(undoing.of_entry(undone, before, last.entry), files)
            found = survey(conn, wanted)
            moved = drift.classify(wanted, found.last.manifest, found.live, last_known=found.last.readable)
            made = found.plan(datetime.now(UTC), moved.drift)
            made = capabilities.shown(conn, wanted, obstacles.shown(conn, wanted, made))
    if given["form"] == "text":
        click.echo(text.plan(made, colour=_colour(given["no_color"]), verbose=given["verbose"]), nl=False)
    else:
        _document(made, given["form"], "plan")
    _save(made, given["out"])


@cli.command()
@_state_option
@_target_option
@_server_options
@_report_options
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Where to save the plan.")
def rehome(**given: Any) -> None:  # noqa: ANN401 - as plan
    """Make the plan that says where the ledger is now: after a clone, an upgrade or a restore.

    Approve and apply it like any other. It changes nothing but the ledger, and voids every approval issued before it.

    \b
    Examples:
      reconciler rehome -t staging --out rehome.plan --dsn postgresql://operator@staging/app
      reconciler rehome -t production --out rehome.plan --format json
    """
    from reconciler import desired, pg
    from reconciler import rehome as rehoming
    from reconciler.render import text

    files = desired.load(given["state"], given["target"])
    with pg.connect(given["dsn"], "rehome") as conn:
        pg.check_version(conn, allow_untested=given["allow_untested_server"])
        with pg.snapshot(conn):
            made, _ = rehoming.plan(conn, files, datetime.now(UTC))
    if given["form"] == "text":
        click.echo(text.plan(made, colour=_colour(given["no_color"]), verbose=given["verbose"]), nl=False)
    else:
        _document(made, given["form"], "plan")
    _save(made, given["out"])


def _prove_revert(plan_file: Path, given: Mapping[str, Any]) -> int:
    """Apply, revert, roll back; the exit code."""
    from reconciler import plan as plans
    from reconciler import undo
    from reconciler.errors import UsageError

    if given["out"] is not None:
        raise UsageError("--prove saves no plan.", hint="Leave --out away; after the apply, `reconciler revert ENTRY`.")
    made, _ = plans.load(plan_file)
    found = undo.prove(given["dsn"], made, allow_untested=given["allow_untested_server"])
    if given["form"] == "json":
        _json(found)
    else:
        for line in found.left:
            click.echo(f"  ! {line}")
        click.echo(
            f"Not undone: {len(found.left)} of {len(made.changes)} changes."
            if found.left
            else f"Applied and reverted: all {len(made.changes)} changes are undone; {found.seconds:.2f} s."
        )
        click.echo("Everything was rolled back.")
    return undo.exit_code(found)


@cli.command()
@_state_option
@_target_option
@_server_options
@_output_options
@click.option("--rehearse", is_flag=True, help="On a scratch copy of the schema; also what needs two sessions.")
@click.option("--scratch", metavar="DSN", help="An empty database for the rehearsal, instead of the embedded server.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Save a rehearsal, for apply --rehearsal.")
@click.option(
    "--mutate", is_flag=True, help="Plant faults in the functions of a rehearsal; say which no proof notices."
)
@click.option(
    "--equivalent",
    type=click.Path(path_type=Path),
    help="With --mutate: the mutants known to make no difference, and why.",
)
@click.pass_context
def prove(ctx: click.Context, /, **given: Any) -> None:  # noqa: ANN401 - as plan
    """Play the proofs on the database as it is, in one transaction that is rolled back.

    \b
    Examples:
      reconciler prove --dsn postgresql://operator@db/app -t production
      reconciler prove --rehearse --out phase2.rehearsal.json
      reconciler prove --mutate --equivalent equivalent-mutants.yaml
    """
    from reconciler import desired
    from reconciler import plan as plans
    from reconciler import prove as proving
    from reconciler.errors import UsageError
    from reconciler.render import text

    if given["scratch"] and not (given["rehearse"] or given["mutate"]):
        raise UsageError("--scratch names where to rehearse.", hint="Add --rehearse or --mutate.")
    if given["out"] and not given["rehearse"]:
        raise UsageError("--out saves what a rehearsal found.", hint="Add --rehearse.")
    if given["equivalent"] and not given["mutate"]:
        raise UsageError("--equivalent says something about mutants.", hint="Add --mutate.")
    wanted = desired.load(given["state"], given["target"])
    untested: bool = given["allow_untested_server"]
    if given["mutate"]:
        from reconciler import mutate

        told = mutate.mutate(
            given["dsn"],
            given["state"],
            wanted,
            _faults_tried,
            equivalent=given["equivalent"],
            scratch=given["scratch"],
            allow_untested=untested,
        )
        if given["form"] == "json":
            _json(told)
        else:
            click.echo(text.mutation(told, colour=_colour(given["no_color"])), nl=False)
        ctx.exit(mutate.exit_code(told))
    if given["rehearse"]:
        from reconciler import rehearsal

        found = rehearsal.prove(given["dsn"], wanted, scratch=given["scratch"], allow_untested=untested)
        if given["out"]:
            plans.write(given["out"], found.dump())
            click.echo(f"Saved {given['out']}. Next: reconciler apply PLAN --rehearsal {given['out']}", err=True)
    else:
        found = proving.prove(given["dsn"], wanted, allow_untested=untested)
    if given["form"] == "json":
        _json(found)
    else:
        click.echo(text.proofs(found, colour=_colour(given["no_color"])), nl=False)
    ctx.exit(proving.exit_code(found))


@cli.command()
@_state_option
@_target_option
@_server_options
@_report_options
@click.option("--anchor", type=click.Path(path_type=Path, dir_okay=False), help="Write the head of the chain here.")
def history(**given: Any) -> None:  # noqa: ANN401 - as plan
    """List what was applied: every entry of the ledger.

    \b
    Examples:
      reconciler history --dsn postgresql://auditor@db/app -t production
      reconciler history --anchor ledger.anchor --format markdown >> audit.md
    """
    from reconciler import verify as verifying
    from reconciler.errors import UsageError

    name, target, rows = _chain(given)
    found = verifying.history(name, rows)
    if given["anchor"]:
        if not rows:
            raise UsageError(f"{name} has no ledger entry on this database; there is nothing to anchor.")
        head = verifying.Anchor(
            name=name,
            database=target.database,
            system_identifier=target.system_identifier,
            number=rows[-1]["number"],
            hash=rows[-1]["hash"],
            recorded_at=found.entries[-1].recorded_at,
        )
        verifying.write_anchor(given["anchor"], head)
    if given["form"] == "text":
        from reconciler.render import text

        click.echo(text.history(found), nl=False)
    else:
        _document(found, given["form"], "history")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@_state_option
@_target_option
@_server_options
@_output_options
@click.option("--allowed-signers", type=click.Path(path_type=Path), help="Who may sign: checks a folder's signatures.")
@click.option("--anchor", type=click.Path(path_type=Path), help="A head of the chain that was kept elsewhere.")
@click.pass_context
def verify(ctx: click.Context, /, folder: Path | None, **given: Any) -> None:  # noqa: ANN401 - as plan
    """Check the ledger's whole chain; or, with FOLDER, the evidence of one run, without a database.

    \b
    Examples:
      reconciler verify --anchor ledger.anchor --dsn postgresql://auditor@db/app -t production
      reconciler verify evidence/20260522T120000Z-1f0c9a52-... --allowed-signers approvers
    """
    from reconciler import verify as verifying
    from reconciler.errors import UsageError
    from reconciler.yamltext import read_text

    if folder is not None:
        if given["anchor"]:
            raise UsageError("--anchor is of a ledger, not of a folder.", hint="Leave FOLDER out.")
        allowed = None
        if (file := given["allowed_signers"]) is not None:
            allowed, problems = read_text(file, file.parent)
            if allowed is None:
                raise InputError(problems)
        found = verifying.folder(folder, allowed)
    else:
        if given["allowed_signers"]:
            raise UsageError("A ledger holds its own lists of approvers.", hint="Leave --allowed-signers out.")
        anchor = verifying.load_anchor(given["anchor"]) if given["anchor"] else None
        name, _, rows = _chain(given)
        found = verifying.chain(name, rows, anchor)
    if given["form"] == "json":
        _json(found)
    else:
        for line in found.checked:
            click.echo(f"Looked at {line}.")
        for line in found.problems:
            click.echo(f"  ! {line}")
        count = len(found.problems)
        click.echo(
            f"{found.subject}: {count} problem{'' if count == 1 else 's'}." if count else f"{found.subject}: intact."
        )
    ctx.exit(verifying.exit_code(found))


def _chain(given: Mapping[str, Any]) -> tuple[str, Target, list[dict[str, Any]]]:
    """The governance name, the target, and every row of its ledger."""
    from reconciler import desired, ledger, live, pg

    wanted = desired.load(given["state"], given["target"])
    with pg.connect(given["dsn"], "verify") as conn:
        pg.check_version(conn, allow_untested=given["allow_untested_server"])
        with pg.snapshot(conn):
            target = live.identify(conn, wanted)
            ledger.check_shape(conn)
            return wanted.name, target, ledger.chain(conn, wanted.name)


@cli.command()
@click.option("--print-sql", is_flag=True, required=True, help="Print the SQL that creates the ledger.")
@click.option("--owner", metavar="ROLE", help="Give it to this role: best one that cannot log in, without members.")
@click.option("--since", type=click.IntRange(0), default=0, help="Print what upgrades a ledger of this version.")
def ledger(print_sql: bool, owner: str | None, since: int) -> None:
    """The ledger's own SQL, for a DBA who wants to create or upgrade it beforehand.

    \b
    Examples:
      reconciler ledger --print-sql --owner reconciler_ledger | psql -1 "$ADMIN_DSN"
      reconciler ledger --print-sql --since 1 | psql -1 "$ADMIN_DSN"
    """
    from reconciler import setup
    from reconciler.errors import UsageError

    del print_sql
    if since > setup.VERSION:
        raise UsageError(f"There is no version {since} of the ledger; this program makes version {setup.VERSION}.")
    click.echo(setup.source(since, owner), nl=False)


@cli.group()
def sandbox() -> None:
    """An embedded PostgreSQL to try things on.

    \b
    Examples:
      reconciler sandbox up my/schema
      reconciler sandbox load my/schema --dsn postgresql://postgres@localhost/empty
    """


@sandbox.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Where the server keeps its files.")
def up(directory: Path | None, data: Path | None) -> None:
    """Start the embedded server, load the SQL files of DIRECTORY in name order; the DSN is on the last line.

    \b
    Examples:
      reconciler sandbox up
      reconciler sandbox up my/schema
    """
    from reconciler import sandbox as sandboxes

    click.echo(sandboxes.up(directory, data))


@sandbox.command()
@click.option("--data", type=click.Path(path_type=Path), help="Where the server keeps its files.")
def down(data: Path | None) -> None:
    """Stop the embedded server and remove its data.

    \b
    Examples:
      reconciler sandbox down
      reconciler sandbox down --data trial
    """
    from reconciler import sandbox as sandboxes

    click.echo("The sandbox was stopped and removed." if sandboxes.down(data) else "There is no sandbox.", err=True)


@sandbox.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--dsn", envvar="RECONCILER_DSN", required=True, help="An empty database.")
def load(directory: Path, dsn: str) -> None:
    """Load the SQL files of DIRECTORY in name order into an empty database of any server.

    \b
    Examples:
      reconciler sandbox load my/schema --dsn postgresql://postgres@localhost/app
      reconciler sandbox load my/schema --dsn "host=/run/postgresql dbname=trial"
    """
    from reconciler import sandbox as sandboxes

    sandboxes.load(directory, dsn)
    click.echo(f"Loaded {directory}.", err=True)


# ------------------------------------------------------------------------------------------------------------ the edges


def _document(found: Model, form: str, sort: str) -> None:
    """Print a plan, drift report, approval or evidence as JSON, Markdown or HTML."""
    if form == "json":
        _json(found)
        return
    import importlib

    click.echo(getattr(importlib.import_module(f"reconciler.render.{form}"), sort)(found), nl=False)


def _fail(error: ReconcilerError) -> int:
    """Print what went wrong: a sentence, the details, what to do. With --format json also a document on stdout."""
    from reconciler.render.text import printable

    if isinstance(error, InputError):
        lines = [*error.details, f"Error: {error.message}"]
    elif isinstance(error, Interrupted):
        lines = [error.message]
    else:
        lines = [f"Error: {error.message}", *(f"  {detail}" for detail in error.details)]
    if error.hint:
        lines.append(error.hint)
    for line in lines:
        _aside(printable(line))
    if _wants_json(sys.argv[1:]):
        errors = list(error.details) if isinstance(error, InputError) else [error.message, *error.details]
        _json({"format_version": "1.0", "outcome": error.outcome, "errors": errors, "hint": error.hint})
    return error.exit_code


def _wants_json(args: list[str]) -> bool:
    return "--format=json" in args or any(pair == ("--format", "json") for pair in itertools.pairwise(args))


def main() -> NoReturn:
    """The console script. Click's own exit code for bad usage is 2, which here means changes: it becomes 1."""
    try:
        code: Any = cli.main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except ReconcilerError as error:
        sys.exit(_fail(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does.
        sys.stdout = None
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
