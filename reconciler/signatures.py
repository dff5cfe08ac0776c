"""The edge to OpenSSH: signing a file and judging a signature, by `ssh-keygen -Y` and nothing of our own.

Keys in files, in an agent and on hardware tokens all work, and anybody can check what we write with stock tools. The
formats are OpenSSH's: PROTOCOL.sshsig for signatures, ALLOWED SIGNERS in ssh-keygen(1) for who may sign.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from base64 import b64decode, b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from reconciler.errors import UsageError
from reconciler.model import glob_match

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

APPROVAL = "reconciler-approval"
"""Namespace of approvals: a signature that was made for something else does not count."""

BREAK_GLASS = "reconciler-break-glass"
"""Namespace of the one approval that is enough in an emergency."""

PLAN = "reconciler-plan"
"""Namespace of plans that say who made them."""

EVIDENCE = "reconciler-evidence"
"""Namespace of statements about a run."""

SECONDS = 120
"""How long a hardware token may wait for a touch."""

LONGEST_LIST = 256 * 1024
"""Bytes of an allowed_signers file. It stands in every plan that changes it and in every ledger entry."""

LONGEST_SIGNATURE = 64 * 1024
"""Characters of an armoured signature; that of an RSA key of 16384 bits with a large certificate has a tenth."""


@dataclass(frozen=True)
class Signer:
    """Who made a signature: the principal of the list, and the key's fingerprint (`SHA256:…`)."""

    principal: str
    fingerprint: str


class BadSignature(Exception):
    """A signature that does not count; the text is one sentence without subject: `is not by a key of …`."""


def sign(message: bytes, key: Path, namespace: str) -> str:
    """The armoured signature of `message`. key: a private key, or a public one whose private half is in the agent.

    Raises UsageError in ssh-keygen's words.
    """
    if not key.is_file():
        raise UsageError(f"There is no key {key}.", hint="Name a private key, or a public one that the agent holds.")
    asks = _attended()
    done = _run(["-Y", "sign", "-q", "-f", str(key), "-n", namespace], message, may_ask=asks)
    if not done.returncode:
        return done.stdout.decode()
    said = _said(done)
    if "passphrase" in said and not asks:
        private = str(key).removesuffix(".pub")
        raise UsageError(
            f"The key {private} has a passphrase, and nobody is there to type it.",
            hint=f"Load it into an agent (ssh-add {private}) and name its public half: --key {private}.pub.",
        )
    hint = "The agent (SSH_AUTH_SOCK) must hold it: ssh-add." if "No private key found" in said else ""
    raise UsageError(f"ssh-keygen could not sign with {key}: {said}.", hint=hint)


def _attended() -> bool:
    """Is somebody there to type a passphrase? Not in CI, and not without a terminal."""
    terminals = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
    return terminals and not os.environ.get("CI")


def judge(  # noqa: PLR0913, PLR0917 - what ssh-keygen is asked
    message: bytes, signature: str, allowed: str, principal: str, namespace: str, moment: datetime
) -> Signer:
    """Who signed. allowed: the text of an allowed_signers file. moment: the time that keys must be valid at.

    Raises BadSignature.
    """
    if not _PRINCIPAL.fullmatch(principal):
        raise BadSignature(f"names {principal!r}, which is no principal")
    if not _is_armour(signature):
        raise BadSignature("holds no signature that OpenSSH can read: not in the form that ssh-keygen writes")
    with tempfile.TemporaryDirectory(prefix="reconciler-") as folder:
        signers, made = Path(folder, "allowed_signers"), Path(folder, "signature")
        signers.write_text(allowed, "utf-8")
        made.write_text(signature, "utf-8")
        done = _run(
            ["-Y", "verify", "-f", str(signers), "-I", principal, "-n", namespace, "-s", str(made), "-O", _at(moment)],
            message,
        )
    words = done.stdout.decode(errors="replace")
    good = re.search(r'^Good "[^"]*" signature (?:for \S+ )?with \S+ key (SHA256:\S+)', words, re.MULTILINE)
    if done.returncode or good is None:
        raise BadSignature(_why(_said(done), principal, namespace))
    return Signer(principal, good[1])


def judge_any(message: bytes, signature: str, allowed: str, namespace: str, moment: datetime) -> Signer:
    """As `judge`, for a signature that does not say whose it is: any principal of the list may have made it.

    ssh-keygen names the first line with the key, whatever it is for, so it is asked about those for this purpose only.
    """
    if not _is_armour(signature):
        raise BadSignature("holds no signature that OpenSSH can read: not in the form that ssh-keygen writes")
    entries = [(line, _options(entry.options)) for _, line, entry in _lines(allowed) if entry]
    serving = "".join(f"{line}\n" for line, given in entries if given is not None and _serves(given, namespace))
    names = _names(signature, serving, moment)
    if not names and _names(signature, allowed, moment):
        raise BadSignature(f"is by a key that the list allows for other purposes only, not for {namespace}")
    wrong = BadSignature("is not by a key that the list knows at that time")
    for one in (example for name in names for example in _examples(name)):
        try:
            return judge(message, signature, serving, one, namespace, moment)
        except BadSignature as bad:
            wrong = bad
    raise wrong


def _names(signature: str, allowed: str, moment: datetime) -> list[str]:
    """The names and patterns of the first line that has the key of this signature, none when no line has."""
    with tempfile.TemporaryDirectory(prefix="reconciler-") as folder:
        signers, made = Path(folder, "allowed_signers"), Path(folder, "signature")
        signers.write_text(allowed, "utf-8")
        made.write_text(signature, "utf-8")
        done = _run(["-Y", "find-principals", "-f", str(signers), "-s", str(made), "-O", _at(moment)], b"")
    said = [] if done.returncode else done.stdout.decode(errors="replace").split()
    return [name for line in said for name in line.split(",") if not name.startswith("!")]


def _examples(pattern: str) -> list[str]:
    """Names that the pattern of a list stands for; a name is the only one that it stands for.

    Several, for the list may take one of them out again (`*,!x`).
    """
    if not set(pattern) & set("*?"):
        return [pattern]
    return [pattern.replace("*", letter * 3).replace("?", letter) for letter in "x0_"]


def _at(moment: datetime) -> str:
    # Without a letter for the zone the time is that of TZ; older versions of OpenSSH know no such letter.
    return f"verify-time={moment.astimezone(UTC):%Y%m%d%H%M%S}"


_PRINCIPAL = re.compile(r"[A-Za-z0-9._@+][A-Za-z0-9._@+-]{0,199}")
"""A name that `problems` lets stand in a list; patterns are not names."""


def _is_armour(signature: str) -> bool:
    """Is it exactly what ssh-keygen writes? It travels in approvals and ledgers, and nothing shall ride along."""
    found = re.fullmatch(
        r"-----BEGIN SSH SIGNATURE-----\n([A-Za-z0-9+/=\n]+)\n-----END SSH SIGNATURE-----\n?", signature
    )
    if found is None or len(signature) > LONGEST_SIGNATURE:
        return False
    text = found[1].replace("\n", "")
    lines = [text[at : at + 70] for at in range(0, len(text), 70)]
    try:
        return b64encode(b64decode(text, validate=True)).decode() == text and found[1] == "\n".join(lines)
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------------- the list


@dataclass(frozen=True)
class Entry:
    """One line of an allowed_signers file. principals: as written, a list of names and patterns. number: from 1."""

    number: int
    principals: tuple[str, ...]
    options: str
    type: str
    key: str

    @property
    def written(self) -> str:
        """The line without what OpenSSH does not read: comment, quotes around the names, spaces."""
        return " ".join(part for part in (",".join(self.principals), self.options, self.type, self.key) if part)


def plain(allowed: str) -> str:
    """The list without comments, empty lines and spare spaces, line ends as Unix has them: what is in effect.

    So another comment changes nothing that would have to be approved. A line that is no entry stays as it is.
    """
    lines = [entry.written if entry else line.strip() for _, line, entry in _lines(allowed)]
    return "".join(f"{line}\n" for line in lines)


def fingerprints(allowed: str) -> dict[str, list[str]]:
    """Principal (or pattern of them, as written) -> fingerprints of its keys, for people to read."""
    found: dict[str, list[str]] = {}
    entries = [entry for _, _, entry in _lines(allowed) if entry]
    shown = _fingerprints(entries)
    for entry in entries:
        for principal in entry.principals:
            found.setdefault(principal, []).append(shown.get(entry.number, "unreadable key"))
    return found


def most(allowed: str, namespace: str) -> int | None:
    """How many distinct principals with distinct keys could sign at most; None when the list sets no limit.

    An authority certifies any number of keys, and a pattern stands for any number of names.
    """
    names, keys = set[str](), set[str]()
    for _, _, entry in _lines(allowed):
        given = _options(entry.options) if entry else None
        if entry is None or given is None or not _serves(given, namespace):
            continue
        if "cert-authority" in given:
            return None
        names |= set(entry.principals)
        keys.add(entry.key)
    if any(set(name) & set("*?") for name in names):
        return len(keys)
    return min(len(keys), len(names))


def _serves(options: Mapping[str, str], namespace: str) -> bool:
    allowed = options.get("namespaces")
    return allowed is None or any(glob_match(pattern, namespace) for pattern in allowed.split(","))


def who(allowed: str, namespace: str, moment: datetime) -> list[str]:
    """The names and patterns of principals with a key that is good for this namespace at this time, sorted."""
    at = moment.astimezone(UTC)
    found = set[str]()
    for _, _, entry in _lines(allowed):
        given = _options(entry.options) if entry else None
        if entry is None or given is None or not _serves(given, namespace):
            continue
        after, before = (_time(given[name]) if name in given else None for name in ("valid-after", "valid-before"))
        if (after is None or after <= at) and (before is None or at <= before):
            found |= {name for name in entry.principals if not name.startswith("!")}
    return sorted(found)


def problems(allowed: str) -> list[tuple[int, str]]:
    """(line, sentence) for every line of an allowed_signers file that OpenSSH would not take, or not as it reads."""
    if len(allowed.encode()) > LONGEST_LIST:
        return [(1, f"a list of approvers has at most {LONGEST_LIST // 1024} KiB")]
    wrong: list[tuple[int, str]] = []
    shown = _fingerprints([entry for _, _, entry in _lines(allowed) if entry])
    seen: dict[tuple[str, str], int] = {}
    for number, line, entry in _lines(allowed):
        if hidden := sorted({char for char in line if not (char.isprintable() or char == "\t")}):
            wrong.append((number, f"{hidden[0]!r} does not belong into a list of approvers"))
        elif entry is None:
            wrong.append((number, "expected: principals [options] key-type base64-key [comment]"))
        else:
            wrong += [(number, sentence) for sentence in _wrong(entry, shown, seen)]
    return wrong


def _wrong(entry: Entry, shown: Mapping[int, str], seen: dict[tuple[str, str], int]) -> Iterator[str]:
    names = ",".join(entry.principals)
    if not all(re.fullmatch(r"!?[A-Za-z0-9._@+*?][A-Za-z0-9._@+*?-]*", name) for name in entry.principals):
        yield f"{names!r} is no list of principals: letters, digits and ._@+- separated by commas"
    if entry.number not in shown:
        yield f"{entry.type} {entry.key[:16]}… is no public key"
    given = _options(entry.options)
    if given is None:
        yield f'{entry.options!r}: expected cert-authority, namespaces="…", valid-after="…", valid-before="…", once'
        return
    times = {name: _time(given[name]) for name in ("valid-after", "valid-before") if name in given}
    for name, moment in times.items():
        if moment is None:
            yield f'{name}="{given[name]}": expected a time in UTC, YYYYMMDD or YYYYMMDDHHMM or YYYYMMDDHHMMSS'
    if len(times) == 2 and all(times.values()) and str(times["valid-after"]) >= str(times["valid-before"]):
        yield "valid-before is not after valid-after: the key is never valid"
    for name in entry.principals:
        first = seen.setdefault((name, entry.key), entry.number)
        if first != entry.number:
            yield f"{name} has this key in line {first} too: which options hold would depend on the order"


def _time(text: str) -> datetime | None:
    """A time of a list, in UTC as TZ is for ssh-keygen; None when it is none."""
    digits = text.removesuffix("Z")
    form = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(len(digits))
    try:
        return datetime.strptime(digits, form).replace(tzinfo=UTC) if form and digits.isdecimal() else None
    except ValueError:
        return None


_OPTION = re.compile(
    r"""(?:(cert-authority)|(namespaces|valid-after|valid-before)="([^"\\]+)")(?:,(?=.)|$)""", re.IGNORECASE
)


def _options(text: str) -> dict[str, str] | None:
    """Options of an entry by name, in small letters; None when OpenSSH would not take them."""
    found: dict[str, str] = {}
    rest = text
    while rest:
        option = _OPTION.match(rest)
        name = (option[1] or option[2]).lower() if option else ""
        if option is None or name in found:
            return None
        found[name] = option[3] or ""
        rest = rest[option.end() :]
    return found


_KEY = re.compile(
    r"""
    ^\s*(?P<principals>"[^"]+"|\S+)\s+
    (?:(?P<options>(?:[^\s"]|"[^"]*")+)\s+)??
    (?P<type>(?:sk-)?(?:ssh|ecdsa)-[\w@.-]+)\s+(?P<key>[A-Za-z0-9+/=]+)(?:\s.*)?$
    """,
    re.VERBOSE,
)


def _lines(allowed: str) -> Iterator[tuple[int, str, Entry | None]]:
    """(number, line, entry) of every line that is not empty and no comment; None for what is no entry.

    Lines end where OpenSSH ends them: Python knows more ways, and what one reads as a comment the other must too.
    """
    for number, ended in enumerate(allowed.split("\n"), 1):
        line = ended.removesuffix("\r")
        if not line.strip(" \t") or line.lstrip(" \t").startswith("#"):
            continue
        found = _KEY.match(line)
        yield (
            number,
            line,
            found
            and Entry(
                number=number,
                principals=tuple(found["principals"].strip('"').split(",")),
                options=found["options"] or "",
                type=found["type"],
                key=found["key"],
            ),
        )


def _fingerprints(entries: Sequence[Entry]) -> dict[int, str]:
    """Line number -> fingerprint, of the keys that ssh-keygen can read."""
    if not entries:
        return {}
    given = "".join(f"{entry.type} {entry.key} {entry.number}\n" for entry in entries)
    done = _run(["-l", "-f", "/dev/stdin"], given.encode())
    found = re.findall(r"^\d+ (SHA256:\S+) (\d+) \(", done.stdout.decode(errors="replace"), re.MULTILINE)
    return {int(number): shown for shown, number in found}


# ------------------------------------------------------------------------------------------------------- the program


def _run(arguments: Sequence[str], given: bytes, *, may_ask: bool = False) -> subprocess.CompletedProcess[bytes]:
    """ssh-keygen with a fixed locale and time zone. may_ask: for a passphrase, on the terminal.

    Raises UsageError when it is not installed, too old, or hangs.
    """
    program = shutil.which("ssh-keygen")
    if program is None:
        raise UsageError(
            "There is no ssh-keygen here.", hint="Install OpenSSH (Debian: apt-get install openssh-client)."
        )
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    if not may_ask:
        # Neither a terminal nor a window: what would wait there for somebody fails instead.
        environment = {name: value for name, value in environment.items() if name not in _WINDOWS}
        environment["SSH_ASKPASS_REQUIRE"] = "never"
    try:
        done = subprocess.run(
            [program, *arguments],
            check=False,
            capture_output=True,
            input=given,
            timeout=SECONDS,
            env=environment,
            start_new_session=not may_ask,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"ssh-keygen did not end within {SECONDS} seconds.", hint="Touch the token, then repeat."
        ) from None
    if re.search(rb"(unknown|illegal|invalid) option -- '?Y", done.stderr):
        raise UsageError(
            f"{program} is too old to sign and to check signatures.", hint="Install OpenSSH 8.9 or a newer one."
        )
    return done


_WINDOWS = frozenset({"DISPLAY", "WAYLAND_DISPLAY", "SSH_ASKPASS"})


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = [*done.stderr.decode(errors="replace").splitlines(), *done.stdout.decode(errors="replace").splitlines()]
    wanted = [line.strip().rstrip(".") for line in lines if line.strip()]
    return "; ".join(wanted[:2]) if wanted else f"it ended with {done.returncode}"


def _why(said: str, principal: str, namespace: str) -> str:
    """OpenSSH's reason in a sentence that says what it means here."""
    small = said.lower()
    meanings = (
        (("expired", "not yet valid", "outside"), f"is by a key of {principal} that is not valid at this time"),
        (
            ("not permitted for use in signature namespace",),
            f"is by a key of {principal} that the list allows for other purposes only, not for {namespace}",
        ),
        (("namespace",), f"was made for another purpose than {namespace}"),
        (
            ("parse signature", "armor", "incomplete message", "invalid format"),
            f"holds no signature that OpenSSH can read: {said}",
        ),
        (("incorrect signature",), "does not fit what was signed: a byte of it was changed"),
        (("not a listed principal",), f"is by a key whose certificate is not for {principal}"),
        (
            ("no principal", "not allowed", "could not verify", "not authorized"),
            f"is not by a key that the installed list knows as {principal}",
        ),
    )
    return next(
        (meaning for words, meaning in meanings if any(word in small for word in words)),
        f"was refused by ssh-keygen: {said}",
    )
