"""The edge to OpenSSH: signing a file and judging a signature, by `ssh-keygen -Y` and nothing of our own.

Keys in files, in an agent and on hardware tokens all work, and anybody can check what we write with stock tools. The
formats are OpenSSH's: PROTOCOL.sshsig for signatures, ALLOWED SIGNERS in ssh-keygen(1) for who may sign.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reconciler.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

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
    done = _run(["-Y", "sign", "-q", "-f", str(key), "-n", namespace], message)
    if done.returncode:
        raise UsageError(f"ssh-keygen could not sign with {key}: {_said(done)}.")
    return done.stdout.decode()


def judge(  # noqa: PLR0913, PLR0917 - what ssh-keygen is asked
    message: bytes, signature: str, allowed: str, principal: str, namespace: str, moment: datetime
) -> Signer:
    """Who signed. allowed: the text of an allowed_signers file. moment: the time that keys must be valid at.

    Raises BadSignature.
    """
    if not re.fullmatch(r"[^\s,*?!\"'\x00-\x1f]{1,200}", principal):
        raise BadSignature(f"names {principal!r}, which is no principal")
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
    """As `judge`, for a signature that does not say whose it is: any principal of the list may have made it."""
    with tempfile.TemporaryDirectory(prefix="reconciler-") as folder:
        signers, made = Path(folder, "allowed_signers"), Path(folder, "signature")
        signers.write_text(allowed, "utf-8")
        made.write_text(signature, "utf-8")
        done = _run(["-Y", "find-principals", "-f", str(signers), "-s", str(made), "-O", _at(moment)], b"")
    names = done.stdout.decode(errors="replace").split()
    if done.returncode or not names:
        raise BadSignature("is not by a key that the list knows at that time")
    return judge(message, signature, allowed, names[0].split(",")[0], namespace, moment)


def _at(moment: datetime) -> str:
    # Without a letter for the zone the time is that of TZ; older versions of OpenSSH know no such letter.
    return f"verify-time={moment:%Y%m%d%H%M%S}"


def fingerprints(allowed: str) -> dict[str, list[str]]:
    """Principal (or pattern of them, as written) -> fingerprints of its keys, for people to read."""
    found: dict[str, list[str]] = {}
    for line in allowed.splitlines():
        entry = _entry(line)
        if entry is None:
            continue
        done = _run(["-l", "-f", "/dev/stdin"], f"{entry[1]} {entry[2]}\n".encode())
        shown = done.stdout.decode().split()
        for principal in entry[0].split(","):
            found.setdefault(principal, []).append(shown[1] if len(shown) > 1 else "unreadable key")
    return found


def problems(allowed: str) -> list[tuple[int, str]]:
    """(line, sentence) for every line of an allowed_signers file that OpenSSH would not take."""
    wrong: list[tuple[int, str]] = []
    for number, line in enumerate(allowed.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        entry = _entry(line)
        if entry is None:
            wrong.append((number, "expected: principals [options] key-type base64-key [comment]"))
            continue
        if not re.fullmatch(r"[A-Za-z0-9._@+*?!,-]+", entry[0]):
            wrong.append(
                (number, f"{entry[0]!r} is no list of principals: letters, digits and ._@+- separated by commas")
            )
        if _run(["-l", "-f", "/dev/stdin"], f"{entry[1]} {entry[2]}\n".encode()).returncode:
            wrong.append((number, f"{entry[1]} {entry[2][:16]}… is no public key"))
    return wrong


_KEY = re.compile(
    r"""
    ^\s*(?P<principals>"[^"]+"|\S+)\s+
    (?:(?P<options>(?:[^\s"]|"[^"]*")+)\s+)??
    (?P<type>(?:sk-)?(?:ssh|ecdsa)-[\w@.-]+)\s+(?P<key>[A-Za-z0-9+/=]+)(?:\s.*)?$
    """,
    re.VERBOSE,
)


def _entry(line: str) -> tuple[str, str, str] | None:
    """(principals, key type, key) of one line, None for an empty one, a comment, or no entry at all."""
    if not line.strip() or line.lstrip().startswith("#"):
        return None
    found = _KEY.match(line)
    return None if found is None else (found["principals"].strip('"'), found["type"], found["key"])


def _run(arguments: Sequence[str], given: bytes) -> subprocess.CompletedProcess[bytes]:
    """ssh-keygen with a fixed locale and time zone. Raises UsageError when it is not installed or hangs."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise UsageError(
            "There is no ssh-keygen here.", hint="Install OpenSSH (Debian: apt-get install openssh-client)."
        )
    try:
        return subprocess.run(
            [program, *arguments],
            check=False,
            capture_output=True,
            input=given,
            timeout=SECONDS,
            env={**os.environ, "LC_ALL": "C", "TZ": "UTC"},
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"ssh-keygen did not end within {SECONDS} seconds.", hint="Touch the token, then repeat."
        ) from None


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = [*done.stderr.decode(errors="replace").splitlines(), *done.stdout.decode(errors="replace").splitlines()]
    wanted = [line.strip().rstrip(".") for line in lines if line.strip()]
    return "; ".join(wanted[:2]) if wanted else f"it ended with {done.returncode}"


def _why(said: str, principal: str, namespace: str) -> str:
    """OpenSSH's reason in a sentence that says what it means here."""
    if "expired" in said or "not yet valid" in said or "outside" in said.lower():
        return f"is by a key of {principal} that is not valid at this time"
    if "namespace" in said:
        return f"was made for another purpose than {namespace}"
    if any(words in said for words in ("parse signature", "armor", "incomplete message", "invalid format")):
        return f"holds no signature that OpenSSH can read: {said}"
    if "incorrect signature" in said:
        return "does not fit what was signed: a byte of it was changed"
    if "no principal" in said.lower() or "not allowed" in said.lower() or "Could not verify" in said:
        return f"is not by a key that the installed list knows as {principal}"
    return f"was refused by ssh-keygen: {said}"
