"""A signature that does not say whose it is: any line of the list that is for its purpose may have made it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from reconciler import signatures
from tests.unit.test_signatures import NOW, agent, certified, filled, keys, public

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["agent", "certified", "keys"]


def judge_any(listed: str, signature: str, message: bytes = b"yes") -> signatures.Signer:
    return signatures.judge_any(message, signature, listed, signatures.EVIDENCE, NOW)


GOOD = {
    "a name": "runner {one}",
    "names": "a,b {one}",
    "every name": "* {one}",
    "a pattern": '*@example.org namespaces="reconciler-evidence" {one}',
    "a pattern of letters": "run???-? {one}",
    "all but some": '"!x*,!0@example.org,*@example.org" {one}',
    "all but one, the other way round": "*,!x {one}",
    "first for something else": 'a namespaces="reconciler-approval" {one}\nb namespaces="reconciler-evidence" {one}',
    "first expired": 'a valid-before="20200101" {one}\nb {one}',
    "another person before": "a {two}\nb {one}",
    "comments": "# a list\n\n# {one}\nb {one} at the office\n",
}

BAD = {
    "nobody": ("", "is not by a key that the list knows at that time"),
    "somebody else": ("runner {two}", "is not by a key that the list knows at that time"),
    "expired": ('runner valid-before="20200101" {one}', "is not by a key that the list knows at that time"),
    "an authority": ("runner cert-authority {one}", "is not by a key that the list knows at that time"),
    "for something else": ('runner namespaces="reconciler-approval" {one}', "not for reconciler-evidence"),
    "nobody but taken out": ("!runner {one}", "is not by a key that the list knows at that time"),
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_somebody_of_the_list(keys: Path, text: str) -> None:
    made = signatures.sign(b"yes", keys / "one", signatures.EVIDENCE)
    found = judge_any(filled(keys, text), made)
    assert found.fingerprint == signatures.fingerprints(filled(keys, "x {one}"))["x"][0]
    with pytest.raises(signatures.BadSignature, match="a byte of it was changed"):
        judge_any(filled(keys, text), made, b"no")


@pytest.mark.parametrize(("text", "sentence"), BAD.values(), ids=BAD)
def test_nobody_of_the_list(keys: Path, text: str, sentence: str) -> None:
    made = signatures.sign(b"yes", keys / "one", signatures.EVIDENCE)
    with pytest.raises(signatures.BadSignature, match=sentence):
        judge_any(filled(keys, text), made)


def test_made_for_another_purpose(keys: Path) -> None:
    made = signatures.sign(b"yes", keys / "one", signatures.APPROVAL)
    with pytest.raises(signatures.BadSignature, match="was made for another purpose than reconciler-evidence"):
        judge_any(filled(keys, "*@example.org {one}"), made)


@pytest.mark.parametrize("signature", ["", "-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n", "x\0"])
def test_no_signature(keys: Path, signature: str) -> None:
    with pytest.raises(signatures.BadSignature):
        judge_any(filled(keys, "* {one}"), signature)


@pytest.mark.usefixtures("agent")
def test_a_certificate(keys: Path, certified: Callable[..., str]) -> None:
    made = certified("-n", "runner@example.org,other", "-V", "20260101:20270101")
    for names in ("*", "*@example.org", "other", "x,runner@example.org"):
        listed = f"{names} cert-authority {public(keys, 'ca')}\n"
        assert signatures.judge_any(b"yes", made, listed, signatures.APPROVAL, NOW).principal in {
            "other",
            "runner@example.org",
        }
    for listed in (
        f"*@example.com cert-authority {public(keys, 'ca')}\n",
        f"* cert-authority {public(keys, 'two')}\n",
        f"* {public(keys, 'ca')}\n",
        f'* cert-authority,valid-before="20200101" {public(keys, "ca")}\n',
    ):
        with pytest.raises(signatures.BadSignature):
            signatures.judge_any(b"yes", made, listed, signatures.APPROVAL, NOW)
    late = certified("-n", "runner@example.org", "-V", "20200101:20210101")
    with pytest.raises(signatures.BadSignature):
        signatures.judge_any(b"yes", late, f"* cert-authority {public(keys, 'ca')}\n", signatures.APPROVAL, NOW)
