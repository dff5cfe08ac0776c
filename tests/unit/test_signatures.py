"""The edge to OpenSSH: lists of approvers as OpenSSH reads them, hostile names and signatures, other programs."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from reconciler import signatures
from reconciler.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NOW = datetime(2026, 5, 22, 12, 0, 0, tzinfo=UTC)
HARDWARE = (
    "sk-ssh-ed25519@openssh.com"
    " AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAICFo/k5LU8863u66YC9eUO2170QduohPURkQnbLa/dczAAAABHNzaDo="
)
"""The public half of a key that lives in a security token, as OpenSSH writes it."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys one and two, and one of each other sort."""
    folder = tmp_path_factory.mktemp("keys")
    for name, more in (("one", []), ("two", []), ("ca", []), ("ecdsa", ["-t", "ecdsa"]), ("rsa", ["-t", "rsa"])):
        sort = [] if more else ["-t", "ed25519"]
        subprocess.run(["ssh-keygen", "-q", *sort, *more, "-N", "", "-f", folder / name], check=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "a secret", "-f", folder / "locked"], check=True)
    return folder


def public(keys: Path, name: str = "one") -> str:
    return " ".join((keys / f"{name}.pub").read_text().split()[:2])


@pytest.fixture(scope="module")
def signed(keys: Path) -> str:
    return signatures.sign(b"yes", keys / "one", signatures.APPROVAL)


def judge(text: str, signature: str, name: str = "operator", moment: datetime = NOW) -> signatures.Signer:
    return signatures.judge(b"yes", signature, text, name, signatures.APPROVAL, moment)


# ----------------------------------------------------------------------------------------------------------- the list

GOOD = {
    "plain": "operator {one}",
    "with a comment": "operator {one} operator@example.org, the office key # 1",
    "two names": "reviewer,operator {one}",
    "quoted names": '"reviewer,operator" {one}',
    "a pattern": "oper* {one}",
    "a pattern for one letter": "operato? {one}",
    "all but one": "*,!reviewer {one}",
    "a namespace": 'operator namespaces="reconciler-approval" {one}',
    "namespaces": 'operator namespaces="file,reconciler-*" {one}',
    "a window": 'operator valid-after="20200101",valid-before="20300101" {one}',
    "a window to the second": 'operator valid-after="20260522120000",valid-before="20260522120001" {one}',
    "a window in UTC": 'operator valid-before="202605221201Z" {one}',
    "capitals": 'operator NAMESPACES="reconciler-approval" {one}',
    "two keys": "operator {two}\noperator {one}",
    "spaces and tabs": "  operator\t {one}\t",
    "Windows line ends": "# a list\r\n\r\noperator {one}\r\n",
    "comments and empty lines": "# a list\n\n   # more\noperator {one}",
    "a key of a token beside": f"reviewer {HARDWARE}\noperator {{one}}",
}

BAD = {
    "no key": ("operator", "expected: principals"),
    "a short key": ("operator ssh-ed25519 AAAA", "is no public key"),
    "a key of another sort": ("operator ssh-rsa {bare}", "is no public key"),
    "an unknown option": ("operator no-touch-required {one}", "expected cert-authority"),
    "options apart": ('operator valid-after="20200101" valid-before="20300101" {one}', "expected: principals"),
    "no time": ('operator valid-after="tomorrow" {one}', "expected a time in UTC"),
    "a time with dashes": ('operator valid-before="2030-01-01" {one}', "expected a time in UTC"),
    "the 31st of February": ('operator valid-before="20300231" {one}', "expected a time in UTC"),
    "no quotes": ("operator valid-after=20200101 {one}", "expected cert-authority"),
    "never": ('operator valid-after="20300101",valid-before="20200101" {one}', "never valid"),
    "an option twice": ('operator namespaces="a",namespaces="b" {one}', "once"),
    "an empty namespace": ('operator namespaces="" {one}', "expected cert-authority"),
    "a comma too many": ("operator cert-authority, {one}", "expected cert-authority"),
    "a dash first": ("-operator {one}", "is no list of principals"),
    "metacharacters": ("$(reboot) {one}", "is no list of principals"),
    "a semicolon": ("operator;reviewer {one}", "is no list of principals"),
    "accents": ("opérator {one}", "is no list of principals"),
    "an empty name": ("operator,,reviewer {one}", "is no list of principals"),
    "the same key twice": ("operator {one}\noperator {one}", "in line 1 too"),
    "an expired key again": ('operator valid-before="20200101" {one}\noperator {one}', "in line 1 too"),
    "a hidden line": ("# a comment\x0boperator {one}", ""),
    "a line separator": ("reviewer {one} x\u2028operator {two}", "does not belong"),
    "a carriage return": ("# a comment\roperator {one}", ""),
    "a zero byte": ("operator {one}\x00", "does not belong"),
    "an escape": ("operator {one} \x1b[2K", "does not belong"),
    "text turned round": ("operator {one} \u202eeno", "does not belong"),
}


def filled(keys: Path, text: str) -> str:
    one = public(keys)
    return text.format(one=one, two=public(keys, "two"), bare=one.split()[1]) + "\n"


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_a_list_that_is_taken_is_one_that_openssh_takes(keys: Path, signed: str, text: str) -> None:
    listed = filled(keys, text)
    assert signatures.problems(listed) == []
    for one in (listed, signatures.plain(listed)):
        assert judge(one, signed).principal == "operator"
    assert "#" not in signatures.plain(listed)
    assert signatures.plain(signatures.plain(listed)) == signatures.plain(listed)


@pytest.mark.parametrize(("text", "sentence"), BAD.values(), ids=BAD)
def test_a_list_with_a_line_that_is_none(keys: Path, text: str, sentence: str) -> None:
    found = signatures.problems(filled(keys, text))
    if not sentence:  # a comment to OpenSSH, and so to us
        assert found == []
        assert signatures.fingerprints(filled(keys, text)) == {}
        return
    assert any(sentence in said for _, said in found), found
    assert found[-1][0] == filled(keys, text).count("\n")


def test_another_comment_is_the_same_list(keys: Path) -> None:
    one, two = public(keys), public(keys, "two")
    before = signatures.plain(f"operator {one} old laptop\nreviewer {two}\n")
    assert before == f"operator {one}\nreviewer {two}\n"
    assert signatures.plain(f"# who may\r\n\r\n operator  {one} new laptop \r\n\treviewer {two}") == before
    assert signatures.plain(f"reviewer {two}\noperator {one}\n") != before


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("a {one}\nb {two}", 2),
        ("a {one}\na {two}", 1),
        ("a {one}\nb {one}", 1),
        ("a,b {one}", 1),
        ("a {one}\n* {two}", 2),
        ("a cert-authority {one}", None),
        ("a {one} cert-authority", 1),
        ('a {one}\nb namespaces="file" {two}', 1),
        ('a {one}\nb namespaces="reconciler-a*" {two}', 2),
        ("", 0),
    ],
)
def test_how_many_could_approve(keys: Path, text: str, most: int | None) -> None:
    assert signatures.most(filled(keys, text), signatures.APPROVAL) == most


def test_who_could_approve_at_a_time(keys: Path) -> None:
    listed = filled(
        keys,
        'a valid-before="20260522" {one}\nb valid-after="20260523" {two}\nc,d,!e {one}\nf namespaces="file" {two}\n'
        'g valid-after="20260522",valid-before="20260523" {two}',
    )
    assert signatures.who(listed, signatures.APPROVAL, NOW) == ["c", "d", "g"]
    assert signatures.who(listed, signatures.APPROVAL, NOW - timedelta(days=1)) == ["a", "c", "d"]


def test_a_long_list_is_one_question(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: (asked.append(1), run(*args, **more))[1])
    listed = "".join(f"person-{number} {public(keys)}\n" for number in range(2_000))
    assert len(signatures.fingerprints(listed)) == 2_000
    assert signatures.problems(listed) == []
    assert len(asked) == 2
    assert signatures.problems(listed * 2) == [(1, "a list of approvers has at most 256 KiB")]
    assert len(asked) == 2


def test_keys_of_every_sort_are_shown(keys: Path) -> None:
    listed = "".join(f"{name} {public(keys, name)}\n" for name in ("one", "ecdsa", "rsa")) + f"token {HARDWARE}\n"
    assert signatures.problems(listed) == []
    shown = signatures.fingerprints(listed)
    assert list(shown) == ["one", "ecdsa", "rsa", "token"]
    assert shown["token"] == ["SHA256:6WZVJ44bqhAWLVP4Ns0TDkoSQSsZo/h2K+mEvOaNFbw"]
    for name in ("ecdsa", "rsa"):
        made = signatures.sign(b"yes", keys / name, signatures.APPROVAL)
        assert judge(listed, made, name).fingerprint == shown[name][0]


# ------------------------------------------------------------------------------------------------------- the judgement


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-",
        "-f/etc/passwd",
        "--",
        "*",
        "oper*",
        "operato?",
        "!operator",
        "operator,reviewer",
        "operator\n",
        'operator\nGood "reconciler-approval" signature for reviewer with ED25519 key SHA256:x',
        "operator reviewer",
        " operator",
        "operator\t",
        "operator\x00",
        "$(reboot)",
        "`reboot`",
        "operator;reboot",
        "operator|reboot",
        "'operator'",
        '"operator"',
        "opérator",
        "operator\u200b",
        "\u202eoperator",
        "/etc/passwd",
        "o" * 201,
    ],
)
def test_a_name_that_nobody_has(keys: Path, signed: str, name: str) -> None:
    """Not even where the list is open to every name."""
    with pytest.raises(signatures.BadSignature, match="which is no principal"):
        judge(f"* {public(keys)}\n", signed, name)


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        ("reviewer {one}", "operator", "is not by a key that the installed list knows as operator"),
        ("operator {two}", "operator", "is not by a key that the installed list knows as operator"),
        ("OPERATOR {one}", "operator", "is not by a key that the installed list knows as operator"),
        ("operator cert-authority {one}", "operator", "is not by a key that the installed list knows as operator"),
        ("*,!operator {one}", "operator", "is not by a key that the installed list knows as operator"),
        ('operator namespaces="file" {one}', "operator", "that the list allows for other purposes only"),
        ('operator namespaces="git" {one}', "operator", "that the list allows for other purposes only"),
        ('operator valid-before="20260522115959" {one}', "operator", "is not valid at this time"),
        ('operator valid-after="20260522120001" {one}', "operator", "is not valid at this time"),
        ("", "operator", "is not by a key that the installed list knows as operator"),
    ],
)
def test_a_signature_that_does_not_count(keys: Path, signed: str, text: str, name: str, sentence: str) -> None:
    with pytest.raises(signatures.BadSignature, match=sentence):
        judge(filled(keys, text), signed, name)


def test_other_bytes_and_other_purposes(keys: Path, signed: str) -> None:
    listed = filled(keys, "operator {one}")
    with pytest.raises(signatures.BadSignature, match="a byte of it was changed"):
        signatures.judge(b"yes!", signed, listed, "operator", signatures.APPROVAL, NOW)
    for namespace in ("file", "git", signatures.BREAK_GLASS, signatures.PLAN, signatures.EVIDENCE, "reconciler"):
        other = signatures.sign(b"yes", keys / "one", namespace)
        with pytest.raises(signatures.BadSignature, match="was made for another purpose than reconciler-approval"):
            judge(listed, other)


def test_windows_are_those_of_utc_wherever_the_clock_stands(keys: Path, signed: str) -> None:
    listed = filled(keys, 'operator valid-after="20260522120000",valid-before="20260522120001" {one}')
    for hours in (-11, 0, 7, 14):
        assert judge(listed, signed, moment=NOW.astimezone(timezone(timedelta(hours=hours))))
    with pytest.raises(signatures.BadSignature, match="not valid at this time"):
        judge(listed, signed, moment=NOW.replace(tzinfo=timezone(timedelta(hours=7))))


# -------------------------------------------------------------------------------------------------------- certificates


@pytest.fixture
def certified(keys: Path, tmp_path: Path) -> Callable[..., str]:
    """Signs with a certificate: `certified("-n", "operator")` has these options of the authority."""

    def make(*options: str, authority: str = "ca") -> str:
        for name in ("one", "one.pub"):
            (tmp_path / name).write_bytes((keys / name).read_bytes())
        (tmp_path / "one").chmod(0o600)
        certify = ["ssh-keygen", "-q", "-s", keys / authority, "-I", "id", *options, tmp_path / "one.pub"]
        subprocess.run(certify, check=True)
        certificate = tmp_path / "one-cert.pub"
        # Only an agent signs with a certificate; ssh-add takes the one that lies beside the key.
        subprocess.run(["ssh-add", "-q", tmp_path / "one"], check=True)
        return signatures.sign(b"yes", certificate, signatures.APPROVAL)

    return make


@pytest.fixture
def agent(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An agent that holds the key one."""
    socket = tmp_path / "agent"
    running = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.readline()
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    subprocess.run(["ssh-add", "-q", keys / "one"], check=True)
    yield
    running.terminate()
    running.communicate()


@pytest.mark.usefixtures("agent")
def test_certificates(keys: Path, certified: Callable[..., str]) -> None:
    listed = f"operator cert-authority {public(keys, 'ca')}\n"
    good = judge(listed, certified("-n", "operator,other", "-V", "20260101:20270101"))
    assert good.fingerprint == signatures.fingerprints(filled(keys, "x {one}"))["x"][0]
    anyone = f"* cert-authority {public(keys, 'ca')}\n"
    assert judge(anyone, certified("-n", "operator", "-V", "20260101:20270101")).principal == "operator"
    for options, text, sentence in (
        (("-n", "reviewer"), listed, "whose certificate is not for operator"),
        (("-n", "reviewer"), anyone, "whose certificate is not for operator"),
        ((), anyone, "not by a key|not for operator"),
        (("-n", "operator", "-V", "20200101:20210101"), listed, "not valid at this time"),
        (("-n", "operator", "-V", "20270101:20280101"), listed, "not valid at this time"),
        (("-n", "operator"), f"operator {public(keys, 'ca')}\n", "not by a key that the installed list knows"),
        (("-n", "operator"), f"reviewer cert-authority {public(keys, 'ca')}\n", "not by a key that the installed"),
        (("-n", "operator"), f'operator cert-authority,valid-before="20260101" {public(keys, "ca")}\n', "not valid at"),
    ):
        made = certified(*options)
        with pytest.raises(signatures.BadSignature, match=sentence):
            judge(text, made)
    with pytest.raises(signatures.BadSignature, match="not by a key that the installed list knows"):
        judge(listed, certified("-n", "operator", authority="two"))


# --------------------------------------------------------------------------------------------------------- the program


def test_no_ssh_keygen(keys: Path, signed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for action in (
        lambda: signatures.sign(b"yes", keys / "one", signatures.APPROVAL),
        lambda: judge(filled(keys, "operator {one}"), signed),
        lambda: signatures.problems(filled(keys, "operator {one}")),
    ):
        with pytest.raises(UsageError, match=r"There is no ssh-keygen here\.") as refused:
            action()
        assert "openssh-client" in refused.value.hint


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("unknown option -- Y", "is too old to sign and to check signatures"),
        ("ssh-keygen: illegal option -- Y", "is too old to sign and to check signatures"),
        ("ssh-keygen: invalid option -- 'Y'", "is too old to sign and to check signatures"),
    ],
)
def test_an_ssh_keygen_from_before_signatures(
    keys: Path, signed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, sentence: str
) -> None:
    pretend(tmp_path, monkeypatch, f'echo "{said}" >&2; exit 1')
    for action in (
        lambda: signatures.sign(b"yes", keys / "one", signatures.APPROVAL),
        lambda: judge(filled(keys, "operator {one}"), signed),
    ):
        with pytest.raises(UsageError, match=sentence) as refused:
            action()
        assert "OpenSSH" in refused.value.hint


@pytest.mark.parametrize(
    ("said", "code", "sentence"),
    [
        ("Could not verify signature.", 255, "is not by a key that the installed list knows as operator"),
        ("Signature verification failed: incorrect signature", 255, "a byte of it was changed"),
        ("Couldn't verify signature: namespace does not match", 255, "was made for another purpose"),
        ("Couldn't parse signature: invalid format", 255, "holds no signature that OpenSSH can read"),
        ("something new", 255, "was refused by ssh-keygen: something new"),
        ("", 255, "was refused by ssh-keygen: it ended with 255"),
        ('Good "reconciler-approval" signature for operator with ED25519 key SHA256:x', 1, "was refused by"),
        ("Good signature", 0, "was refused by ssh-keygen"),
        ("", 0, "was refused by ssh-keygen"),
    ],
)
def test_words_of_other_versions(
    keys: Path, signed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, code: int, sentence: str
) -> None:
    """Only its exit code together with its sentence counts as good; what is not known is told as it was said."""
    (tmp_path / "said").write_text(said)
    pretend(tmp_path, monkeypatch, f'cat "{tmp_path}/said"; exit {code}')
    with pytest.raises(signatures.BadSignature, match=sentence):
        judge(filled(keys, "operator {one}"), signed)


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "ssh-keygen"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_a_key_with_a_passphrase_and_nobody_there(keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a question nor a window: one sentence that says what to do."""
    asked = tmp_path / "asked"
    (tmp_path / "askpass").write_text(f"#!/bin/sh\ntouch {asked}\necho 'a secret'\n")
    (tmp_path / "askpass").chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(tmp_path / "askpass"))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with pytest.raises(UsageError, match="has a passphrase, and nobody is there to type it") as refused:
        signatures.sign(b"yes", keys / "locked", signatures.APPROVAL)
    assert refused.value.hint == (
        f"Load it into an agent (ssh-add {keys / 'locked'}) and name its public half: --key {keys / 'locked'}.pub."
    )
    assert not asked.exists()
    with pytest.raises(UsageError, match="has a passphrase") as refused:
        signatures.sign(b"yes", keys / "locked.pub", signatures.APPROVAL)
    assert f"ssh-add {keys / 'locked'})" in refused.value.hint


def test_in_ci_nobody_is_asked_even_with_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.delenv("CI", raising=False)
    assert signatures._attended()  # pyright: ignore[reportPrivateUsage] - no terminal can be had here
    monkeypatch.setenv("CI", "true")
    assert not signatures._attended()  # pyright: ignore[reportPrivateUsage] - no terminal can be had here
    monkeypatch.delenv("CI")
    monkeypatch.setattr("sys.stdin", None)
    assert not signatures._attended()  # pyright: ignore[reportPrivateUsage] - no terminal can be had here


@pytest.mark.usefixtures("agent")
def test_a_key_of_the_agent(keys: Path, signed: str, tmp_path: Path) -> None:
    (tmp_path / "one.pub").write_text((keys / "one.pub").read_text())
    made = signatures.sign(b"yes", tmp_path / "one.pub", signatures.APPROVAL)
    assert judge(filled(keys, "operator {one}"), made) == judge(filled(keys, "operator {one}"), signed)


@pytest.mark.parametrize("what", ["nothing", "a folder", "no key", "a public key alone"])
def test_what_is_no_key(keys: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    path = tmp_path / "key"
    if what == "a folder":
        path.mkdir()
    elif what == "no key":
        path.write_text("secret\n")
    elif what == "a public key alone":
        path.write_text((keys / "one.pub").read_text())
    with pytest.raises(UsageError, match=r"There is no key|could not sign with") as refused:
        signatures.sign(b"yes", path, signatures.APPROVAL)
    assert str(path) in refused.value.message
