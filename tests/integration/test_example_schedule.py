"""examples/schedule: linted by the tools of others, and each really run, as planner, with every exit code there is.

Only the directories that the files name are elsewhere, and the server; what is run stands in the files.
"""

from __future__ import annotations

import configparser
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

import reconciler
from tests import tools
from tests.integration import governed
from tests.integration.test_example_roles import OPERATOR, System, copied, served
from tests.servers import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

EXAMPLE = PROJECT / "examples" / "schedule"
SERVICE = "reconciler-drift.service"
UNITS = (SERVICE, "reconciler-drift.timer", "reconciler-drift-alert.service")
DIRECTORIES = ("/etc/reconciler", "/srv/governance", "/opt/reconciler/bin", "/var/lib/reconciler")


def parsed(name: str) -> Any:
    return YAML(typ="safe", pure=True).load(EXAMPLE / name)


class Unit:
    """A unit file: the values of each key, in order."""

    def __init__(self, text: str) -> None:
        lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
        self.pairs = [tuple(line.split("=", 1)) for line in lines]

    def all(self, key: str) -> list[str]:
        return [value for name, value in self.pairs if name == key]

    def one(self, key: str) -> str:
        (value,) = self.all(key)
        return value


class Ran(NamedTuple):
    """How a look ended: its exit code, all that was said, and calls of the program that tells people."""

    code: int
    said: str
    calls: tuple[list[str], ...] = ()


class Machine:
    """A machine on which the files are installed, with its directories elsewhere."""

    def __init__(self, system: System, root: Path) -> None:
        self.system = system
        self.root = root
        for directory in DIRECTORIES:
            self.at(directory).mkdir(parents=True)
        programs = self.at("/opt/reconciler/bin")
        (programs / "drift.sh").symlink_to(EXAMPLE / "drift.sh")
        (programs / "reconciler").symlink_to(os.path.join(sysconfig.get_path("scripts"), "reconciler"))  # noqa: PTH118
        self.at("/srv/governance/state").symlink_to(system.state)
        self.report = self.at("/var/lib/reconciler/drift.txt")
        self.service_file = self.at("/etc/reconciler/pg_service.conf")
        self.connect("open sesame")

    def at(self, path: str) -> Path:
        return self.root / path.removeprefix("/")

    def here(self, text: str) -> str:
        """A text of the example with the directories of this machine."""
        return re.sub("|".join(map(re.escape, DIRECTORIES)), lambda found: str(self.at(found[0])), text)

    def text(self, name: str) -> str:
        return self.here((EXAMPLE / name).read_text())

    def connect(self, password: str) -> None:
        """The example's service file, with the server of this run."""
        file = configparser.ConfigParser()
        file.read_string((EXAMPLE / "pg_service.conf").read_text())
        section = file["drift"]
        assert section["user"] == "planner"
        server = self.system.db.server
        section.update(host="127.0.0.1", port=str(server.port), dbname=self.system.db.name, password=password)
        section.update(sslmode="disable")
        del section["sslrootcert"]
        with self.service_file.open("w") as out:
            file.write(out, space_around_delimiters=False)
        self.service_file.chmod(0o440)  # what libpq would not take of a password file

    def run(self, words: list[str], env: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run it with these variables and no others, but for where the package under test lies."""
        given = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        return tools.run(words, env={**given, **env}, cwd=cwd, stdin=subprocess.DEVNULL)

    # -------------------------------------------------------------------------------------------------- four schedules

    def cron(self) -> Ran:
        """As cron does: the variables of the file and its own, the line to /bin/sh in the home directory."""
        *settings, line = (
            line for line in self.text("reconciler-drift.cron").splitlines() if line and not line.startswith("#")
        )
        env = dict(setting.split("=", 1) for setting in settings)
        found = re.fullmatch(r"([\d,]+) \* \* \* \* (\w+) (.*)", line)
        assert found is not None
        assert "%" not in line  # it ends a command of cron
        done = self.run(["/bin/sh", "-c", found[3]], {"HOME": str(self.root), "LOGNAME": found[2], **env}, self.root)
        return Ran(done.returncode, done.stdout + done.stderr)

    def systemd(self) -> Ran:
        """As systemd does: a credential that only the service may read, no shell, a line of the journal each."""
        unit = Unit(self.text(SERVICE))
        credentials = self.root / "run/credentials"
        credentials.mkdir(parents=True, exist_ok=True)
        for credential in unit.all("LoadCredential"):
            name, source = credential.split(":", 1)
            shutil.copy(source, credentials / name)
        env = dict(value.replace("%d", str(credentials)).split("=", 1) for value in unit.all("Environment"))
        cwd = self.at("/srv/governance")
        assert str(cwd) == unit.one("WorkingDirectory")
        words = shlex.split(unit.one("ExecStart"))
        done = self.run(words, {**env, "JOURNAL_STREAM": "8:1"}, cwd)
        return Ran(done.returncode, done.stdout + done.stderr)

    def kubernetes(self) -> Ran:
        """The container's command with its variables; the image's program is `reconciler`."""
        (container,) = pod()["containers"]
        env = {one["name"]: self.here(one["value"]) for one in container["env"]}
        words = [str(self.at("/opt/reconciler/bin/reconciler")), *map(self.here, container["args"])]
        done = self.run(words, env, self.root)
        return Ran(done.returncode, done.stdout + done.stderr)

    def github(self, *, issue: str = "") -> Ran:
        """The steps that are scripts, as a runner does it: files for outputs and summary, the first failure is the end.

        issue: the number of an open one.
        """
        place = self.root / "runner"
        shutil.rmtree(place, ignore_errors=True)
        (place / "bin").mkdir(parents=True)
        (place / "state").symlink_to(self.system.state)
        stub = place / "bin/gh"
        stub.write_text(
            f'#!/bin/sh\nprintf "%s\\0" "$@" >> {place}/calls; echo >> {place}/calls\n'
            f'case "$1 $2" in "issue list") echo "{issue}" ;; esac\n'
        )
        stub.chmod(0o755)
        path = f"{place}/bin:{self.at('/opt/reconciler/bin')}:/usr/bin:/bin"
        known = {"secrets.RECONCILER_DSN": "service=drift", "github.token": "t", "github.repository": "o/r",
                 "github.server_url": "https://git.example.org", "github.run_id": "7"}  # fmt: skip
        said, code = "", 0
        for step in parsed("github-actions.yml")["jobs"]["drift"]["steps"]:
            if "run" not in step or step.get("name") == "Install":
                continue
            out = place / "outputs"
            out.write_text("")
            env = {name: filled(value, known) for name, value in step.get("env", {}).items()}
            env |= {"PATH": path, "GITHUB_OUTPUT": str(out), "GITHUB_STEP_SUMMARY": str(place / "summary")}
            env |= {"PGSERVICEFILE": str(self.service_file)} if "RECONCILER_DSN" in env else {}
            done = self.run(["/bin/bash", "-e", "-c", step["run"]], env, place)
            said, code = said + done.stdout + done.stderr, done.returncode
            if code:
                break
            outputs = dict(line.split("=", 1) for line in out.read_text().splitlines())
            known |= {f"steps.{step.get('id')}.outputs.{name}": value for name, value in outputs.items()}
        calls = (place / "calls").read_text().splitlines() if (place / "calls").exists() else []
        return Ran(code, said, tuple(line.split("\0")[:-1] for line in calls))


def filled(text: str, known: Mapping[str, str]) -> str:
    """A value of the workflow with its expressions filled in."""
    return re.sub(r"\$\{\{ (\S+) \}\}", lambda found: known[found[1]], text)


def pod() -> dict[str, Any]:
    return parsed("kubernetes.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def machine(
    run_directory: Path, new_name: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """The governed system after Phase 2, applied by its roles as target production; planner has a password."""
    folder = tmp_path_factory.mktemp("schedule")
    with (
        contextmanager(served)(run_directory / new_name()) as server,
        contextmanager(copied)(server, new_name(), folder) as system,
    ):
        if system.target == "sandbox":
            system.edit(
                "governance.yaml",
                "production: {database: directus}\n    sandbox:\n      vars:",
                "production:\n      vars:",
            )
        else:
            system.edit(
                "governance.yaml", "production: {database: directus}", f"production: {{database: {system.db.name}}}"
            )
        system.target = "production"
        system.said(OPERATOR, "apply", system.approved(), "--initialize")
        system.db.execute("ALTER ROLE planner PASSWORD 'open sesame'")
        yield Machine(system, tmp_path_factory.mktemp("machine"))


@contextmanager
def as_applied(_: Machine) -> Iterator[None]:
    yield


def by_hand(there: str, back: str) -> Callable[[Machine], Any]:
    """Something done on the server, and put back."""

    @contextmanager
    def done(machine: Machine) -> Iterator[None]:
        machine.system.db.execute(there)
        yield
        machine.system.db.execute(back)

    return done


@contextmanager
def locked_out(machine: Machine) -> Iterator[None]:
    machine.connect("another password")
    yield
    machine.connect("open sesame")


TURNED = "UPDATE public.dot_config SET value = '{}' WHERE key = 'queue.lease.duration_sec'"
SITUATIONS: dict[str, tuple[int, Callable[[Machine], Any]]] = {
    "clean": (0, as_applied),
    "drift": (2, by_hand(TURNED.format("301"), TURNED.format("300"))),
    "violated": (3, by_hand("CREATE SCHEMA cron", "DROP SCHEMA cron")),
    "refused": (4, by_hand("ALTER TABLE reconciler.entry DISABLE TRIGGER ALL", governed.TRIGGERS_ON)),
    "error": (1, locked_out),
}

BEGINS = {
    "drift": "Drift: somebody changed what was applied.",
    "violated": "Violated: what must hold does not",
    "refused": "Refused: not the database that the files mean",
    "error": "Not checked: whether anything drifted is not known.",
}
HOLDS = {
    "clean": "No drift at 2",
    "drift": "gate.queue.lease.duration_sec",
    "violated": "invariant.F01-no-pg-cron",
    "refused": "its triggers are not those of a ledger",
    "error": 'password authentication failed for user "planner"',
}

every_situation = pytest.mark.parametrize("situation", SITUATIONS)


@pytest.fixture
def code(machine: Machine, situation: str) -> Iterator[int]:
    """The exit code of the situation, which lasts as long as the test."""
    expected, made = SITUATIONS[situation]
    with made(machine):
        yield expected


@every_situation
def test_cron_mails_all_that_is_not_well(machine: Machine, situation: str, code: int) -> None:
    ran = machine.cron()
    assert ran.code == code
    if situation == "clean":
        assert ran.said == ""
    else:
        assert ran.said.startswith(BEGINS[situation])
        assert HOLDS[situation] in ran.said
    assert HOLDS[situation] in machine.report.read_text()


@every_situation
def test_systemd_is_told_how_urgent_it_is(machine: Machine, situation: str, code: int) -> None:
    ran = machine.systemd()
    assert ran.code == code
    urgent = {"clean": "", "drift": "<4>", "violated": "<2>", "refused": "<2>", "error": "<3>"}[situation]
    assert ran.said.startswith(urgent + BEGINS.get(situation, ""))
    assert bool(ran.said) == (situation != "clean")
    assert "open sesame" not in ran.said


@every_situation
def test_kubernetes_asks_again_only_where_nobody_could_look(machine: Machine, situation: str, code: int) -> None:
    ran = machine.kubernetes()
    assert ran.code == code
    assert HOLDS[situation] in ran.said
    rules = parsed("kubernetes.yaml")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    ends = [rule["action"] for rule in rules if ran.code in rule.get("onExitCodes", {}).get("values", [])]
    assert ends == (["FailJob"] if situation in {"drift", "violated", "refused"} else [])


@pytest.mark.parametrize(
    ("situation", "issue"), [*((situation, "") for situation in SITUATIONS), ("clean", "12"), ("drift", "12")]
)
def test_github_opens_updates_and_closes_an_issue(machine: Machine, situation: str, code: int, issue: str) -> None:
    ran = machine.github(issue=issue)
    verbs = [call[:2] for call in ran.calls if call[:2] not in (["label", "create"], ["issue", "list"])]
    if situation in {"drift", "violated"}:
        (call,) = (call for call in ran.calls if call[1] in {"create", "edit"} and call[0] == "issue")
        assert verbs == [["issue", "edit" if issue else "create"]]
        assert not issue or call[2] == issue
        assert HOLDS[situation] in (machine.root / "runner" / call[-1]).read_text()
        assert "https://git.example.org/o/r/actions/runs/7" in (machine.root / "runner" / call[-1]).read_text()
    else:
        assert verbs == ([["issue", "close"]] if issue and situation == "clean" else [])
    assert ran.code == {"clean": 0, "drift": 0, "violated": 3, "refused": 4, "error": 1}[situation]
    said = {"clean": "", "drift": "::warning title=Drift::", "violated": "::error title=Violated::"}
    said |= {"refused": "::error title=Refused::", "error": "::error title=Not checked::Nobody could look (exit 1)"}
    assert said[situation] in ran.said
    assert ("::" in ran.said) == (situation != "clean")
    assert code == SITUATIONS[situation][0]


def test_looking_writes_nothing(machine: Machine) -> None:
    before = governed.image(machine.system.db)
    assert [run().code for run in (machine.cron, machine.systemd, machine.kubernetes, machine.github)] == [0] * 4
    assert governed.image(machine.system.db) == before


def test_a_look_that_is_under_way_is_not_joined(machine: Machine) -> None:
    machine.report.unlink(missing_ok=True)
    with machine.at("/var/lib/reconciler/drift.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert machine.cron() == Ran(0, "")
    assert not machine.report.exists()


# ------------------------------------------------------------------------------------------------------------- drift.sh


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a `reconciler` that says what its script says."""
    (tmp_path / "bin").mkdir()
    return tmp_path


def wrapped(place: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    stub = place / "bin/reconciler"
    stub.write_text(f"#!/bin/sh\n{script}\n")
    stub.chmod(0o755)
    variables = {"PATH": f"{place}/bin:/usr/bin:/bin", "TMPDIR": str(place), **env}
    return tools.run([EXAMPLE / "drift.sh", "-s", "a b"], env=variables, cwd=place)


def left(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name.startswith("tmp."))


def test_the_options_are_those_of_drift(place: Path) -> None:
    done = wrapped(place, 'printf "<%s>" "$@"; exit 2')
    assert (done.returncode, done.stdout.splitlines()[1]) == (2, "<drift><--no-color><-s><a b>")
    assert left(place) == []


def test_a_look_that_does_not_end_is_ended(place: Path) -> None:
    done = wrapped(place, "exec sleep 60", DRIFT_TIMEOUT="0.2")
    assert (done.returncode, done.stdout) == (1, "Not checked: no answer within 0.2 seconds.\n")


def test_a_program_that_is_not_there(place: Path) -> None:
    done = wrapped(place, "exec no-such-program")
    assert done.returncode == 1
    assert done.stdout.startswith("Not checked: whether anything drifted is not known.\n")


@pytest.mark.parametrize(
    ("code", "word"), [(0, ""), (1, "error"), (2, "drift"), (3, "violated"), (4, "refused"), (9, "error")]
)
def test_the_hook_is_called_with_what_is_not_well(place: Path, code: int, word: str) -> None:
    hook = place / "hook"
    hook.write_text(f'#!/bin/sh\necho "$1 $2 $(cat)" > {place}/told\n')
    hook.chmod(0o755)
    done = wrapped(place, f"echo 'the report'; exit {code}", DRIFT_HOOK=str(hook))
    expected = 1 if code == 9 else code
    assert done.returncode == expected
    told = (place / "told").read_text() if (place / "told").exists() else ""
    assert told == (f"{expected} {word} the report\n" if word else "")


def test_a_hook_that_fails_is_said(place: Path) -> None:
    done = wrapped(place, "exit 2", DRIFT_HOOK="/bin/false")
    assert (done.returncode, done.stderr) == (2, "/bin/false failed: nobody was told by it.\n")


def test_a_report_that_cannot_be_written_is_an_error_even_when_all_is_well(place: Path) -> None:
    done = wrapped(place, "echo fine", DRIFT_REPORT=f"{place}/none/report")
    assert done.returncode == 1
    assert f"The report could not be written to {place}/none/report." in done.stderr
    assert wrapped(place, "exit 3", DRIFT_REPORT=f"{place}/none/report").returncode == 3


def test_a_signal_reaches_the_look(place: Path) -> None:
    stub = place / "bin/reconciler"
    stub.write_text(
        f"#!/bin/sh\ntrap 'echo ended > {place}/ended; exit 0' TERM\necho $$ > {place}/pid.new\n"
        f"mv {place}/pid.new {place}/pid\nwhile :; do sleep 0.05; done\n"
    )
    stub.chmod(0o755)
    env = {"PATH": f"{place}/bin:/usr/bin:/bin", "TMPDIR": str(place)}
    process = subprocess.Popen([EXAMPLE / "drift.sh"], env=env)
    try:
        while not (place / "pid").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        deadline = time.monotonic() + 60
        while not (place / "ended").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert left(place) == []


# -------------------------------------------------------------------------------------------------------------- linters


def scripts() -> dict[str, tuple[str, str]]:
    """Every shell script of the example: its text and its shell."""
    steps = parsed("github-actions.yml")["jobs"]["drift"]["steps"]
    found = {step["name"]: (step["run"], "bash") for step in steps if "run" in step}
    alert = shlex.split(Unit((EXAMPLE / "reconciler-drift-alert.service").read_text()).one("ExecStart"))
    assert alert[:2] == ["/bin/sh", "-c"]
    return {**found, "drift.sh": ((EXAMPLE / "drift.sh").read_text(), "sh"), "alert": (alert[2], "sh")}


@pytest.mark.parametrize("name", ["drift.sh", "alert", "Install", "Look", "Tell"])
def test_shellcheck_finds_nothing(name: str) -> None:
    assert set(scripts()) == {"drift.sh", "alert", "Install", "Look", "Tell"}
    assert tools.shellcheck(*scripts()[name]) == ""


def test_systemd_takes_the_units_and_they_are_shut_off(machine: Machine) -> None:
    program = tools.program("systemd-analyze", "systemd")
    units = machine.root / "units"
    units.mkdir()
    for name in UNITS:
        (units / name).write_text(machine.text(name))
    done = tools.run([program, "verify", *(units / name for name in UNITS)])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # 0 is shut off from everything, 100 is a service without any limit.
    done = tools.run([program, "security", "--offline=true", "--threshold=15", "--no-pager", units / SERVICE])
    assert done.returncode == 0, done.stdout
    calendar = Unit((EXAMPLE / "reconciler-drift.timer").read_text()).one("OnCalendar")
    assert tools.run([program, "calendar", calendar]).returncode == 0


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_kubernetes_takes_the_cron_job(version: str) -> None:
    kubernetes_validate.validate(parsed("kubernetes.yaml"), version, strict=True)
    wrong = parsed("kubernetes.yaml")
    wrong["spec"]["concurrency"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_pod_may_do_nothing_but_look() -> None:
    spec = parsed("kubernetes.yaml")["spec"]
    job = spec["jobTemplate"]["spec"]
    assert (spec["concurrencyPolicy"], pod()["restartPolicy"], job["activeDeadlineSeconds"]) == ("Forbid", "Never", 600)
    # The profile `restricted` of the Pod Security Standards.
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod()["automountServiceAccountToken"] is False
    (container,) = pod()["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"])
    (volume,) = pod()["volumes"]
    assert volume["secret"]["defaultMode"] == 0o440


def test_actionlint_finds_nothing_and_every_action_is_pinned(tmp_path: Path) -> None:
    workflow = EXAMPLE / "github-actions.yml"
    assert tools.actionlint(workflow) == []
    broken = tmp_path / "broken.yml"
    broken.write_text(workflow.read_text().replace("steps.look.outputs", "steps.loook.outputs"))
    assert [found["kind"] for found in tools.actionlint(broken)] == ["expression"]
    used = re.findall(r"uses: (\S+)(.*)", workflow.read_text())
    assert used
    assert all(
        re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", name) and comment.startswith(" # v") for name, comment in used
    )
    described = parsed("github-actions.yml")
    assert described["permissions"] == {}
    assert described["jobs"]["drift"]["permissions"] == {"contents": "read", "issues": "write"}
    for step in described["jobs"]["drift"]["steps"]:
        assert "${{" not in step.get("run", "")  # what an expression holds would be a script's text


def test_the_version_that_is_installed_is_this_one() -> None:
    for name in ("github-actions.yml", "Dockerfile"):
        assert re.findall(r"pg-reconciler==([\d.]+)", (EXAMPLE / name).read_text()) == [reconciler.__version__]


def test_every_file_is_explained() -> None:
    explained = (EXAMPLE / "README.md").read_text()
    assert [path.name for path in EXAMPLE.iterdir() if f"`{path.name}`" not in explained] == ["README.md"]
