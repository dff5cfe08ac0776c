"""Secrets without a database: the language, keys and values, what an HMAC is bound to, what is kept back."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import desired, secrets
from reconciler.checks import checks
from reconciler.errors import InputError, UsageError
from reconciler.kinds import kinds
from reconciler.secrets import Key, Sealed, Source, Unspoken
from reconciler.survey import taken
from tests import states

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "gates:\n  app.token: {secret: true, value_from: {env: RECONCILER_VALUE_TOKEN}, reason: r}\n"
BYTES = b"0123456789abcdef0123456789abcdef"
GATE = kinds()["gate"]


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("RECONCILER_SECRET", secrets.PREFIX))]:
        monkeypatch.delenv(name)


def problems(directory: Path, *files: tuple[str, str]) -> list[str]:
    states.write(directory, states.STATE)
    with pytest.raises(InputError) as refused:
        desired.load(states.write(directory, dict(files)), None)
    return [str(problem).removeprefix(f"{directory}/") for problem in refused.value.problems]


def gates(rest: str) -> str:
    """One secret with this in its entry."""
    return f"gates:\n  app.token: {{reason: r, {rest}}}\n"


# ------------------------------------------------------------------------------------------------------------- language

FROM = "value_from: {env: RECONCILER_VALUE_TOKEN}"


@pytest.mark.parametrize(
    ("entry", "place", "message"),
    [
        (f"secret: true, {FROM}, value: 'x'", None, "the value of a secret stands in no file: write `value_from`"),
        ("secret: true", "34", "a secret gate needs `value_from`: {env: NAME} or {file: PATH}"),
        (FROM, "38", "`value_from` is for secrets: write `secret: true` beside it"),
        ("lock: free", "3", 'missing key "value"'),
        (f"secret: true, {FROM}, safe: 'off'", None, "a secret gate has no `safe`: it would name values"),
        (f"secret: true, {FROM}, from: ['off']", None, "a secret gate has no `from`: it would name values"),
        (f"secret: true, {FROM}, order: ['off']", None, "a secret gate has no `order`: it would name values"),
        (f"secret: true, {FROM}, lock: locked", None, "a secret gate cannot be locked: it would need `safe`"),
        ("secret: true, value_from: {env: PGPASSWORD}", None, "the variable must be named RECONCILER_VALUE_"),
        ("secret: true, value_from: {env: RECONCILER_SECRET_KEY}", None, "the variable must be named"),
        ("secret: true, value_from: {env: RECONCILER_VALUE_}", None, "the variable must be named"),
        ("secret: true, value_from: {env: RECONCILER_VALUE_DIR}", None, "the variable must be named"),
        ("secret: true, value_from: {env: reconciler_value_a}", None, "the variable must be named"),
        ('secret: true, value_from: {env: "RECONCILER_VALUE_A\\n"}', None, "the variable must be named"),
        ("secret: true, value_from: {file: /etc/shadow}", None, "the path must be relative to the directory"),
        ("secret: true, value_from: {file: ../shadow}", None, "the path must be relative to the directory"),
        ("secret: true, value_from: {file: a/../../shadow}", None, "the path must be relative to the directory"),
        ("secret: true, value_from: {file: ''}", None, "the path must be relative to the directory"),
        ("secret: true, value_from: {file: .}", None, "the path must be relative to the directory"),
        ("secret: true, value_from: {}", None, "write exactly one of `env` and `file`"),
        ("secret: true, value_from: {env: RECONCILER_VALUE_A, file: a}", None, "write exactly one of `env` and `file`"),
        ("secret: true, value_from: {vault: a}", None, 'unknown key "vault"'),
        ("secret: yes, value: 'x'", "34", "expected true or false"),
    ],
)
def test_what_a_secret_may_not_say(tmp_path: Path, entry: str, place: str | None, message: str) -> None:
    found = [line for line in problems(tmp_path, ("gates.yaml", gates(entry))) if "app.enabled" not in line]
    assert any(message in line for line in found), found
    lines = [line for line in found if message in line]
    assert lines[0].startswith(f"gates.yaml:2:{place}:" if place else "gates.yaml:2:")


def test_no_check_and_no_function_may_name_the_value_of_a_secret(tmp_path: Path) -> None:
    # The gates that the made-up function and proof name, now secret.
    text = states.STATE["gates.yaml"].replace('app.enabled: {value: "true"', f"app.enabled: {{secret: true, {FROM}")
    assert FROM in text
    text = "\n".join(line if FROM not in line else f"  app.enabled: {{secret: true, {FROM}, reason: r}}"
                     for line in text.splitlines()) + "\n"  # fmt: skip
    invariant = 'invariants:\n  open: {gate: app.enabled, equals: "true"}\n'
    found = problems(tmp_path, ("gates.yaml", text), ("more.yaml", invariant))
    assert any(line.startswith("more.yaml:2:16: gate 'app.enabled' is a secret") for line in found), found
    assert any("proofs.yaml" in line and "gate 'app.enabled' is a secret" in line for line in found), found
    assert any("functions.yaml" in line and "gate 'app.enabled' is a secret" in line for line in found), found


@pytest.mark.parametrize(
    "more",
    [
        "    other: {table: public.settings, key: value, value: name}\n",
        '    other: {table: public."settings", key: name, value: value, updated_at: value}\n',
    ],
)
def test_no_other_store_shows_the_column_of_a_secret(tmp_path: Path, more: str) -> None:
    text = states.GOVERNANCE.replace("value: value}\n", f"value: value}}\n{more}", 1)
    entry = f"gates:\n  app.token: {{secret: true, {FROM}, reason: r, store: settings}}\n"
    found = problems(tmp_path, ("governance.yaml", text), ("more.yaml", entry))
    assert any("a secret needs a store that says one thing of the columns of public.settings" in line for line in found)


def test_a_secret_is_valid_without_key_and_value_and_dumps_to_itself(tmp_path: Path) -> None:
    states.write(tmp_path, {**states.STATE, "more.yaml": SECRET + "  app.old: {retire: r, secret: true}\n"})
    found = desired.load(tmp_path, None)
    for address in ("gate.app.token", "gate.app.old"):
        item = found.items[address]
        assert item.rules.dump()["secret"] is True
        assert GATE.declared(item.dump()) == item
    assert found.items["gate.app.token"].spec.dump()["value"] == {"hmac": None, "key": None}
    # Who is no secret is written as ever: ledgers and plans of before stay equal.
    plain = found.items["gate.app.limit"]
    assert not {"secret", "value_from"} & plain.rules.dump().keys()
    assert plain.spec.dump().keys() == {"table", "key", "value"}


def test_the_schema_knows_both_forms() -> None:
    forms = desired.schema()["properties"]["gates"]["additionalProperties"]["anyOf"][0]["anyOf"]
    plain, secret, _ = forms
    assert plain["required"] == ["value", "reason"]
    assert secret["required"] == ["secret", "value_from", "reason"]
    assert secret["properties"].keys() == {"secret", "value_from", "reason", "lock", "store"}


# ------------------------------------------------------------------------------------------------------------------ key


def test_a_key_is_long_enough_and_comes_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert secrets.key() is None
    monkeypatch.setenv(secrets.KEY, "")
    assert secrets.key() is None
    monkeypatch.setenv(secrets.KEY, "x" * 31)
    with pytest.raises(UsageError, match=r"^The key of RECONCILER_SECRET_KEY is shorter than 32 bytes\.$"):
        secrets.key()
    monkeypatch.setenv(secrets.KEY, BYTES.decode())
    given = secrets.key()
    assert given is not None
    file = tmp_path / "key"
    file.write_bytes(BYTES + b"\n")
    monkeypatch.setenv(secrets.KEY_FILE, str(file))
    with pytest.raises(UsageError, match="are both set"):
        secrets.key()
    monkeypatch.delenv(secrets.KEY)
    read = secrets.key()
    assert read is not None
    assert read.fingerprint == given.fingerprint
    assert BYTES.decode() not in f"{read!r} {read.__dict__ if hasattr(read, '__dict__') else ''} {read.fingerprint}"
    monkeypatch.setenv(secrets.KEY_FILE, str(tmp_path / "short"))
    (tmp_path / "short").write_bytes(b"short\n")
    with pytest.raises(UsageError, match="The key of RECONCILER_SECRET_KEY_FILE is shorter"):
        secrets.key()
    monkeypatch.setenv(secrets.KEY_FILE, str(tmp_path / "none"))
    with pytest.raises(UsageError, match="Cannot read the file of RECONCILER_SECRET_KEY_FILE"):
        secrets.key()


def test_a_key_may_come_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, BYTES)
    os.close(writing)
    monkeypatch.setenv(secrets.KEY_FILE, f"/dev/fd/{reading}")
    first, second = secrets.key(), secrets.key()
    os.close(reading)
    assert first is not None
    assert second is not None
    assert first.fingerprint == second.fingerprint


def test_an_hmac_is_bound_to_key_gate_table_and_value() -> None:
    key, other = Key(BYTES), Key(BYTES + b"x")
    one = key.seal("gate.a", "public.t", "same")
    assert one == Key(BYTES).seal("gate.a", "public.t", "same")
    different = [
        key.seal("gate.b", "public.t", "same"),
        key.seal("gate.a", "public.u", "same"),
        key.seal("gate.a", "public.t", "same\n"),
        other.seal("gate.a", "public.t", "same"),
    ]
    assert len({one.hmac, *(each.hmac for each in different)}) == 5
    assert len(str(one.hmac)) == 64
    assert key.fingerprint != other.fingerprint


# --------------------------------------------------------------------------------------------------------------- values


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the one who runs."""
    directory = tmp_path / "values"
    directory.mkdir()
    monkeypatch.setenv(secrets.DIRECTORY, str(directory))
    return directory


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"simple", "simple"),
        (b"one\n", "one"),
        (b"one\r\n", "one"),
        (b"one\n\n", "one\n"),
        (b"a\nb", "a\nb"),
        (b" a ", " a "),
        (b'{"a": "\'; DROP TABLE x; --"}', '{"a": "\'; DROP TABLE x; --"}'),
        ("Ünï€".encode(), "Ünï€"),
        (b"x" * secrets.LONGEST, "x" * secrets.LONGEST),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"x" * (secrets.LONGEST + 1), "is longer than 65536 bytes"),
        (b"x" * (secrets.LONGEST + 99) + b"\n", "is longer than 65536 bytes"),
        (b"a\0b", "contains a NUL character"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
    ids=range(15),
)
def test_the_value_of_a_file(values: Path, data: bytes, found: str) -> None:
    (values / "one").write_bytes(data)
    source = Source(file="one")
    if found.startswith(("is ", "contains ")):
        with pytest.raises(UsageError) as refused:
            secrets.value(source, "gate.a")
        assert refused.value.message.startswith(f"gate.a: file one below RECONCILER_VALUE_DIR {found}")
        assert len(refused.value.message) < 150
    else:
        assert secrets.value(source, "gate.a") == found


def test_the_value_of_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(env="RECONCILER_VALUE_A")
    assert secrets.value(source, "gate.a") is None
    monkeypatch.setenv("RECONCILER_VALUE_A", "")
    assert secrets.value(source, "gate.a") is None
    monkeypatch.setenv("RECONCILER_VALUE_A", "a\n")
    assert secrets.value(source, "gate.a") == "a\n"
    monkeypatch.setitem(os.environ, "RECONCILER_VALUE_A", "a\udcff")
    with pytest.raises(UsageError, match=r"^gate\.a: variable RECONCILER_VALUE_A is not UTF-8\.$"):
        secrets.value(source, "gate.a")


def test_a_file_outside_of_the_directory_is_not_read(values: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("elsewhere")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "inner").write_text("elsewhere")
    (values / "link").symlink_to(tmp_path / "outside")
    (values / "there").symlink_to(tmp_path / "more")
    (values / "far").symlink_to("../outside")
    for name in ("link", "there/inner", "far"):
        with pytest.raises(UsageError, match="is a link that leads out of the directory"):
            secrets.value(Source(file=name), "gate.a")
    # As Kubernetes mounts them: links that stay inside.
    (values / "..data").mkdir()
    (values / "..data" / "kept").write_text("inside")
    (values / "kept").symlink_to("..data/kept")
    assert secrets.value(Source(file="kept"), "gate.a") == "inside"
    os.mkfifo(values / "pipe")
    (values / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UsageError, match="is no ordinary file"):
            secrets.value(Source(file=name), "gate.a")
    assert secrets.value(Source(file="missing"), "gate.a") is None


def test_the_directory_is_named_by_the_one_who_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert secrets.value(Source(file="one"), "gate.a") is None
    for wrong in (".", "one", str(tmp_path / "nowhere")):
        monkeypatch.setenv(secrets.DIRECTORY, wrong)
        with pytest.raises(UsageError, match="RECONCILER_VALUE_DIR is no absolute path of a directory"):
            secrets.value(Source(file="one"), "gate.a")


@pytest.mark.parametrize("place", [".", "state", "state/values"])
def test_values_do_not_lie_where_strangers_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    state = states.write(tmp_path / "state", {**states.STATE, "more.yaml": SECRET})
    (tmp_path / place).mkdir(exist_ok=True)
    monkeypatch.setenv(secrets.KEY, BYTES.decode())
    monkeypatch.setenv(secrets.DIRECTORY, str(tmp_path / place))
    with pytest.raises(UsageError, match="lie inside of each other"):
        taken(desired.load(state, None))


def test_hmacs_are_taken_where_key_and_value_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = states.write(tmp_path, {**states.STATE, "more.yaml": SECRET})

    def value() -> Any:
        return taken(desired.load(files, None)).items["gate.app.token"].spec.dump()["value"]

    assert value() == {"hmac": None, "key": None}
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", "the value")
    assert value() == {"hmac": None, "key": None}
    monkeypatch.setenv(secrets.KEY, BYTES.decode())
    assert value() == Key(BYTES).seal("gate.app.token", "public.settings", "the value").dump()


# ----------------------------------------------------------------------------------------------------------- statements


def secret_change(before: Any, after: Any) -> tuple[Any, Any, Any]:
    rules = GATE.load_rules({"store": states.STORE.dump(), "reason": "100% 'r'", "secret": True, "lock": "approval"})
    made = [
        None
        if value is None
        else GATE.load({"table": "public.settings", "key": "a'%s", "value": None if value == "" else value})
        for value in (before, after)
    ]
    return made[0], made[1], rules


OLD, NEW = Sealed(hmac="1" * 64, key="k").dump(), Sealed(hmac="2" * 64, key="k").dump()


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (None, NEW, 'INSERT INTO "public"."settings" ("name", "value") VALUES (\'a\'\'%s\', $1)'),
        (
            OLD,
            NEW,
            (
                'UPDATE "public"."settings" SET "value" = $1 WHERE "name" OPERATOR(pg_catalog.=) \'a\'\'%s\''
                ' AND "value" OPERATOR(pg_catalog.=) $2'
            ),
        ),
        (
            "",
            NEW,
            (
                'UPDATE "public"."settings" SET "value" = $1 WHERE "name" OPERATOR(pg_catalog.=) \'a\'\'%s\''
                ' AND "value" IS NULL'
            ),
        ),
        (
            OLD,
            None,
            (
                'DELETE FROM "public"."settings" WHERE "name" OPERATOR(pg_catalog.=) \'a\'\'%s\''
                ' AND "value" OPERATOR(pg_catalog.=) $1'
            ),
        ),
    ],
)
def test_statements_have_places_and_no_hmac(before: Any, after: Any, text: str) -> None:
    old, new, rules = secret_change(before, after)
    (statement,) = GATE.render(old, new, rules, None)
    assert statement.text == text
    assert GATE.hazards(old, new, rules) == (set() if after is None else {"arms_gate"})


def test_an_edited_plan_cannot_mix_the_two_sorts() -> None:
    old, new, rules = secret_change(OLD, NEW)
    plain = states.gate("a", "x").rules
    with pytest.raises(TypeError):
        GATE.render(old, new, plain, None)
    with pytest.raises(TypeError):
        GATE.render(states.gate_row("a", "x"), new, rules, None)
    with pytest.raises(TypeError):
        GATE.render(None, states.gate_row("a", "x"), rules, None)
    with pytest.raises(ValueError, match="its value is a secret, of which only an HMAC was kept"):
        GATE.backwards(old, rules, NEW)


# ------------------------------------------------------------------------------------------------------------- unspoken

LONG = "Zebra-\"quoted\"-'ticked'-Ünï-and-more"


@pytest.mark.parametrize(
    "text",
    [
        f"Failing row contains (1, {LONG}).",
        f"Failing row contains (1, {LONG[:20]}...).",
        f"... {LONG[-15:]}, line 3",
        json.dumps({"a": LONG}),
        json.dumps({"a": LONG}, ensure_ascii=False),
        repr([LONG]),
        f"UPDATE x SET y = '{LONG.replace(chr(39), chr(39) * 2)}'",
        base64.b64encode(LONG.encode()).decode(),
        LONG.encode().hex(),
        LONG.encode().hex().upper(),
    ],
)
def test_a_value_is_heard_in_every_spelling(text: str) -> None:
    unspoken = Unspoken()
    assert unspoken.without(text) == text
    unspoken.add(LONG)
    assert unspoken.without(text) == "(not shown: it quotes the value of a secret gate)"
    assert unspoken.without("Failing row contains (1, another).") == "Failing row contains (1, another)."


def test_what_is_too_short_is_not_listened_for() -> None:
    unspoken = Unspoken()
    unspoken.add("a")
    unspoken.add("")
    assert not unspoken.heard_in("a banana")
    unspoken.add("four\nfives")
    assert unspoken.heard_in("line: fives")
    assert not unspoken.held_by({"a": ["four\nfives"]})
    unspoken.add("long enough to be known")
    assert unspoken.held_by({"a": ["x", {"b": "so long enough to be known."}]})


def test_kinds_without_secrets_have_nothing_to_add() -> None:
    marker, change = kinds()["marker"], states.setup()
    bound: Any = marker.bound
    assert (bound(None, change, None), marker.guarded(states.desired(), {}), marker.hidden(states.desired(), {})) == (
        (),
        [],
        {},
    )
    assert "invariant" in checks()
