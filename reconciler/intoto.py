"""Last step of the flow, kept: what a run says of itself, in the words that other tools know, and signed.

Statements of in-toto (https://github.com/in-toto/attestation, Statement v1 with the predicates human-review v0.1,
test-result v0.1 and deployment v1), each in a DSSE envelope (https://github.com/secure-systems-lab/dsse) with a
signature of OpenSSH's, so that a key in an agent or on a token signs and stock tools check. Pure, but for who signs.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

from reconciler.model import canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reconciler.model import Json, JsonObject, Outcome, Verdict

PAYLOAD = "application/vnd.in-toto+json"
FOLDER = "statements"
"""Of an evidence folder: one file for each statement, `<step>.<first 8 digits of the key's id>.json`."""

_TESTED = "test-result"


def statements(found: Outcome, sums: Mapping[str, str]) -> dict[str, JsonObject]:
    """Every statement of a run by its step; none of a run whose outcome nobody knows.

    sums: each file of the folder but these and SHA256SUMS -> its SHA-256. One review for each approval, the tests with
    the whole folder as their subject, and where it was committed the deployment.
    """
    if found.outcome == "unknown":
        return {}
    effects: JsonObject = {"name": "effects", "digest": {"sha256": found.effect_digest}}
    plan = _file("plan.json", sums)
    made: dict[str, JsonObject] = {}
    approvals = [name for name in sums if name.startswith("approvals/")]
    approvals.sort(key=lambda name: int(name.partition("/")[2].partition("-")[0]))
    for number, (name, yes) in enumerate(zip(approvals, found.approvals, strict=True), 1):
        made[f"human-review-{number}"] = _statement(
            [effects, plan, _file(name, sums)],
            "https://in-toto.io/attestation/human-review/v0.1",
            {"result": "pass", "reviewLink": name, "timestamp": yes.issued_at},
        )
    made[_TESTED] = _statement(
        [effects, *(_file(name, sums) for name in sorted(sums))],
        "https://in-toto.io/attestation/test-result/v0.1",
        {"configuration": [plan], **_tests(found)},
    )
    if found.outcome == "applied":
        made["deployment"] = _statement(
            [effects, plan, _file("ledger-entry.json", sums)],
            "https://in-toto.io/attestation/deployment/v1",
            {
                "creationTime": found.finished_at,
                "scopes": {
                    "urn:reconciler:target/v1": found.target.name,
                    "urn:reconciler:database/v1": found.target.database,
                    "urn:reconciler:system-identifier/v1": found.target.system_identifier,
                },
            },
        )
    return made


def _statement(subject: Sequence[JsonObject], kind: str, predicate: JsonObject) -> JsonObject:
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": list(subject),
        "predicateType": kind,
        "predicate": predicate,
    }


def _file(name: str, sums: Mapping[str, str]) -> JsonObject:
    return {"name": name, "digest": {"sha256": sums[name]}}


def _tests(found: Outcome) -> JsonObject:
    """The verdict of every check by name. Somebody's word, and what the policy lets stay not judged, is a warning."""
    passed, warned, failed = list[str](), list[str](), list[str]()
    for verdict in found.checks:
        _list_for(verdict, passed, warned, failed).append(verdict.address)
    result = "FAILED" if failed or found.outcome != "applied" else "WARNED" if warned else "PASSED"
    return {"result": result, "passedTests": passed, "warnedTests": warned, "failedTests": failed}


def _list_for(verdict: Verdict, passed: list[str], warned: list[str], failed: list[str]) -> list[str]:
    if verdict.status in {"held", "passed", "rehearsed", "predicted"}:
        return passed
    if verdict.status in {"attested", "deferred"} or verdict.tolerated:
        return warned
    return failed


# ------------------------------------------------------------------------------------------------------------ envelopes


def pre_authentication(payload: bytes) -> bytes:
    """The bytes that are signed: DSSE's encoding of type and payload (protocol.md, `PAE`)."""
    kind = PAYLOAD.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def signed(made: Mapping[str, JsonObject], sign: Callable[[bytes], str]) -> dict[str, bytes]:
    """The files of these statements by name. sign: bytes -> an armoured SSHSIG. Raises what `sign` does."""
    files: dict[str, bytes] = {}
    for step, statement in made.items():
        payload = canonical(statement)
        armoured = sign(pre_authentication(payload))
        files[f"{FOLDER}/{step}.{key_id(armoured)[:8]}.json"] = envelope(payload, armoured)
    return files


def envelope(payload: bytes, armoured: str) -> bytes:
    """The file of a statement, in its one spelling: no other statement has these bytes as its subject."""
    made = {
        "payloadType": PAYLOAD,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(armoured), "sig": base64.b64encode(armoured.encode()).decode()}],
    }
    return json.dumps(made, indent=2, sort_keys=True).encode() + b"\n"


def key_id(armoured: str) -> str:
    """SHA-256 of the public key inside of an SSHSIG, in hexadecimal; OpenSSH shows the same in base64.

    Raises ValueError for anything else (PROTOCOL.sshsig: magic, version, then the key as a string with its length).
    """
    blob = base64.b64decode("".join(line for line in armoured.split("\n") if line and not line.startswith("-")))
    length = int.from_bytes(blob[10:14], "big")
    if blob[:6] != b"SSHSIG" or len(blob) < 14 + length:
        raise ValueError("no SSHSIG")
    return hashlib.sha256(blob[14 : 14 + length]).hexdigest()


def opened(data: bytes) -> tuple[bytes, str]:
    """Payload and armoured signature of an envelope. Raises ValueError, with what is wrong, for anything else."""
    try:
        found: Any = json.loads(data)
        envelope = cast("dict[str, Json]", found)
        (one,) = envelope["signatures"]
        payload, armoured = base64.b64decode(envelope["payload"]), base64.b64decode(one["sig"]).decode()
        if set(envelope) != {"payload", "payloadType", "signatures"} or envelope["payloadType"] != PAYLOAD:
            raise ValueError("it is no envelope of an in-toto statement")
        if set(one) != {"keyid", "sig"} or one["keyid"] != key_id(armoured):
            raise ValueError("its key is not that of its signature")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is no envelope: {type(error).__name__}") from None
    return payload, armoured
