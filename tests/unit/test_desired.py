"""A state directory -> everything declared, or every problem of every file at once, each at its place."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import desired
from reconciler.errors import InputError, UsageError
from reconciler.model import Desired, Json, Place
from reconciler.yamltext import parse
from tests import states
from tests.servers import PROJECT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import EllipsisType


def load(directory: Path, target: str | None = None, **files: str | None) -> Desired:
    """The made-up state with some files replaced (`gates__yaml=...`)."""
    changed = {name.replace("__", "."): content for name, content in files.items()}
    states.write(directory, states.STATE)
    return desired.load(states.write(directory, changed), target)


def problems(directory: Path, *files: tuple[str, str]) -> list[str]:
    """What is wrong with the made-up state after some files were replaced; paths relative to the directory."""
    states.write(directory, states.STATE)
    with pytest.raises(InputError) as refused:
        desired.load(states.write(directory, dict(files)), None)
    return [str(problem).removeprefix(f"{directory}/") for problem in refused.value.problems]


def test_everything_is_read_and_keeps_its_place(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert list(found.items) == [
        "function.public.fn_one(integer)",
        "gate.app.enabled",
        "gate.app.limit",
        "gate.app.phase",
        "marker.worker",
    ]
    assert list(found.checks) == ["invariant.no-blank", "invariant.no-cron", "proof.refuses"]
    assert (found.name, found.release, found.target, found.database, found.ledger) == (
        "app",
        "first",
        "main",
        None,
        None,
    )
    assert found.items["gate.app.limit"].place == Place(str(tmp_path / "gates.yaml"), 3, 3)
    assert found.stores == {"settings": states.STORE}
    assert found.policy.approval.signed is False
    assert found.policy.apply.lock_timeout == "800ms"


def test_a_function_is_what_its_file_says_with_the_defaults_of_postgresql(tmp_path: Path) -> None:
    spec = load(tmp_path).items["function.public.fn_one(integer)"].spec.dump()
    assert {name: spec[name] for name in ("volatility", "parallel", "cost", "strict", "security_definer")} == {
        "volatility": "volatile",
        "parallel": "unsafe",
        "cost": 100,
        "strict": False,
        "security_definer": False,
    }
    assert spec["args"] == [{"name": "p_limit", "mode": "in", "type": "integer", "default": "5"}]
    assert spec["body"] == "\nBEGIN\n    RETURN p_limit;\nEND\n"
    assert spec["config"] == ["search_path=pg_catalog, public, pg_temp"]
    assert [(grant["grantee"], grant["grantor"]) for grant in spec["acl"]] == [
        ("app_caller", "app_owner"),
        ("app_owner", "app_owner"),
    ]


def test_the_digest_of_the_files_changes_with_any_byte_of_any_file(tmp_path: Path) -> None:
    digests = {load(tmp_path / "0").source_digest, load(tmp_path / "same").source_digest}
    assert len(digests) == 1
    for number, (name, text) in enumerate(states.STATE.items(), 1):
        directory = states.write(tmp_path / str(number), {**states.STATE, name: text + "\n"})
        digests.add(desired.load(directory, None).source_digest)
    assert len(digests) == 1 + len(states.STATE)


def test_files_of_other_kinds_are_not_read(tmp_path: Path) -> None:
    before = load(tmp_path)
    states.write(tmp_path, {"README.md": "# hello", "a.yaml.bak": ": :", "a.json": "{", ".git/x": b"\xff"})
    assert desired.load(tmp_path, None) == before


# ---------------------------------------------------------------------------------------------------------- targets


TWO = states.GOVERNANCE.replace(
    "targets: {main: {}}",
    "targets:\n    main: {database: app, vars: {who: two}, ledger: " + "a" * 64 + "}\n    other: {}\n"
    "  vars: {who: one, sets: {exactly: [plpgsql]}}",
)
INVARIANTS = "invariants:\n  who: {forbid: {extension: {var: who}}}\n  set: {extensions: {var: sets}}\n"


def test_variables_are_those_of_the_target_and_then_the_common_ones(tmp_path: Path) -> None:
    main = load(tmp_path, "main", governance__yaml=TWO, invariants__yaml=INVARIANTS)
    other = desired.load(tmp_path, "other")
    assert main.checks["invariant.who"].spec.dump()["forbid"]["extension"] == "two"
    assert other.checks["invariant.who"].spec.dump()["forbid"]["extension"] == "one"
    assert main.checks["invariant.set"].spec.dump()["extensions"] == {"exactly": ["plpgsql"]}
    assert (main.database, main.ledger) == ("app", "a" * 64)
    assert (other.database, other.ledger) == (None, None)
    assert [one.target for one in desired.load_all(tmp_path)] == ["main", "other"]


@pytest.mark.parametrize(
    ("target", "message", "hint"),
    [
        (None, "Which target? The files have main, other.", "Name one with --target."),
        ("mian", "There is no target 'mian'.", "Did you mean 'main'?"),
        ("zzz", "There is no target 'zzz'.", "The files have main, other."),
    ],
)
def test_a_target_must_be_one_of_the_files(tmp_path: Path, target: str | None, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        load(tmp_path, target, governance__yaml=TWO)
    assert (refused.value.message, refused.value.hint) == (message, hint)


def test_a_problem_of_one_target_is_found_without_naming_it(tmp_path: Path) -> None:
    text = TWO.replace("    other: {}", "    other: {vars: {who: [1]}}")
    states.write(tmp_path, {**states.STATE, "governance.yaml": text, "invariants.yaml": INVARIANTS})
    desired.load(tmp_path, "main")
    with pytest.raises(InputError) as refused:
        desired.load_all(tmp_path)
    assert [problem.line for problem in refused.value.problems] == [2]


def test_a_problem_of_every_target_is_told_once(tmp_path: Path) -> None:
    states.write(
        tmp_path, {**states.STATE, "governance.yaml": TWO, "gates.yaml": "gates:\n  app.enabled: {value: 1}\n"}
    )
    with pytest.raises(InputError) as refused:
        desired.load_all(tmp_path)
    found = [str(problem) for problem in refused.value.problems]
    assert len(found) == len(set(found)) >= 2


# ----------------------------------------------------------------------------------------------------------- problems


def test_all_problems_of_all_files_come_at_once_in_order(tmp_path: Path) -> None:
    files = {
        "z.yaml": "gates:\n  app.z: {value: ▶1, reason: r}\n  ▶app.enabled: {value: x, reason: r}\n",
        "a.yaml": "▶gaets: {}\nfunctions:\n  public.fn_two(): {source: ▶none.sql, owner: o}\n",
        "functions/fn_one.sql": "CREATE FUNCTION public.fn_one(integer) RETURNS▶",
    }
    expected: list[str] = []
    for name, text in sorted(files.items()):
        for line, content in enumerate(text.splitlines(), 1):
            expected += [
                f"{name}:{line}:{content.replace('▶', '').index(after[:4]) + 1 if after else len(content)}"
                for after in content.split("▶")[1:]
            ]
    found = problems(tmp_path, *((name, text.replace("▶", "")) for name, text in files.items()))
    assert [line.split(": ")[0] for line in found] == expected


def test_an_address_in_two_files_names_both_places(tmp_path: Path) -> None:
    found = problems(tmp_path, ("more.yaml", "\ngates:\n  app.limit: {value: '1', reason: again}\n"))
    assert found == [f"more.yaml:3:3: gates.app.limit is already declared at {tmp_path}/gates.yaml:3:3"]


def test_governance_stands_once(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, ("second.yaml", states.GOVERNANCE))
    assert found == f"second.yaml:1:1: section governance is already declared at {tmp_path}/governance.yaml:1:1"


SECTIONS = "sections: governance, pins, functions, gates, markers, invariants, surface, proofs"


def test_without_governance_what_can_be_said_is_said(tmp_path: Path) -> None:
    states.write(tmp_path, {"a.yaml": "gates:\n  a: {value: 1}\nnothing: 1\n"})
    with pytest.raises(InputError) as refused:
        desired.load(tmp_path, None)
    assert [str(problem).removeprefix(str(tmp_path)) for problem in refused.value.problems] == [
        ": no file has the section `governance`",
        f"/a.yaml:3:1: unknown section 'nothing'; {SECTIONS}",
    ]


LATER = "'%s' is no duration: write a number and ms, s, m, h or d, for example 800ms or 24h"
PINNED = (
    " must pin its path with pg_temp last (SET search_path = pg_catalog, public, pg_temp): a temporary table could"
    " otherwise stand in for a real one"
)
LOCKED = (
    "a locked gate may hold only its safe value 'false', not 'true'; only a proof may arm it, inside a transaction that"
    " is rolled back"
)
FORM = "an invariant has exactly one of the keys forbid, extensions, gate, query, untouched, pin, attest"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("governance.yaml", "version: 1", "version: ▶2", "must be at most 1, this is the number 2"),
        ("governance.yaml", "name: app\n", "name: ▶App-1\n", ...),
        ("governance.yaml", "targets: {main: {}}", "targets: ▶{}", ...),
        (
            "governance.yaml",
            "public.settings",
            "▶settings",
            "'settings' is no qualified name: write schema.table, for example public.settings",
        ),
        ("governance.yaml", "[{table: public.workers}]", "[{table: ▶a.b.c}]", ...),
        (
            "governance.yaml",
            "{store: settings,",
            "{store: ▶setings,",
            "gate store 'setings' is not declared in governance.gate_stores",
        ),
        ("governance.yaml", "expires: 24h", "expires: ▶soon", LATER % "soon"),
        ("governance.yaml", "required: 1", "required: ▶0", ...),
        ("gates.yaml", 'value: "100"', "value: ▶100", ...),
        (
            "gates.yaml",
            "lock: approval",
            "lock: ▶maybe",
            'expected one of free, approval, locked, got the text "maybe"',
        ),
        ("gates.yaml", "lock: approval", "▶lokc: approval", 'unknown key "lokc" (did you mean "lock"?)'),
        (
            "gates.yaml",
            'value: "true", from: ["false"], safe: "false", lock: approval',
            'value: ▶"true", from: ["false"], safe: "false", lock: locked',
            LOCKED,
        ),
        (
            "gates.yaml",
            'safe: "false", lock: approval',
            "lock: ▶locked",
            "a locked gate needs `safe`, the only value it may hold",
        ),
        ("gates.yaml", "value: second", "value: ▶fourth", "'fourth' is not in `order`"),
        ("gates.yaml", "[first, second, third]", "▶[first, second, first]", "`order` names a value twice"),
        (
            "gates.yaml",
            "Small enough.",
            "Small, store: ▶other",
            "gate store 'other' is not declared (governance.gate_stores: settings)",
        ),
        (
            "functions.yaml",
            "[app.enabled]",
            "[app.enabled, ▶app.enbled]",
            "gate 'app.enbled' is not declared; did you mean 'app.enabled'?",
        ),
        ("functions.yaml", "[app.enabled]", "[▶other]", "gate 'other' is not declared"),
        (
            "functions.yaml",
            "public.fn_one(integer):",
            "▶public.fn_one(int):",
            "write the identity as regprocedure prints it: public.fn_one(integer)",
        ),
        (
            "functions.yaml",
            "public.fn_one(integer):",
            "▶public.fn_one(bigint):",
            "DIR/functions/fn_one.sql creates public.fn_one(integer), not public.fn_one(bigint)",
        ),
        ("functions.yaml", "functions/fn_one.sql", "▶functions/one.sql", "DIR/functions/one.sql: does not exist"),
        (
            "functions.yaml",
            "functions/fn_one.sql",
            "▶/etc/passwd",
            "/etc/passwd: lies outside the state directory (links resolved): copy it into it",
        ),
        (
            "functions.yaml",
            "[app_caller]",
            "▶[PUBLIC]",
            "EXECUTE for PUBLIC needs `waive: {public_execute: <reason>}`",
        ),
        ("functions.yaml", "[app_caller]", "▶[a, b, a]", "a role is named twice"),
        (
            "functions.yaml",
            "owner: app_owner",
            "owner: app_owner\n    waive: {all: ▶please}",
            "there is no rule 'all'; rules: pinned_path, public_execute",
        ),
        (
            "functions.yaml",
            "owner: app_owner",
            "owner: app_owner\n    waive: {pinned_path: ▶' '}",
            "a waiver needs a reason",
        ),
        ("markers.yaml", "public.workers", "▶workers", ...),
        (
            "markers.yaml",
            'values: {beats: "0"}',
            'values: {beats: "0", last_seen: ▶"now"}',
            "stands in `bind` too; a column has one source",
        ),
        (
            "markers.yaml",
            'values: {beats: "0"}',
            "via: {function: public.f, args: {p: ▶{bind: seen}}}",
            "`bind` has no 'seen'",
        ),
        ("markers.yaml", 'values: {beats: "0"}', "via: {function: ▶f}", ...),
        ("markers.yaml", "{name: worker}", "▶{}", ...),
        ("markers.yaml", "within: 5m", "within: ▶5 minutes", LATER % "5 minutes"),
        ("invariants.yaml", "  no-cron: {forbid: {extension: pg_cron}}", "  ▶no-cron: {}", FORM),
        ("invariants.yaml", "no-cron: {forbid", "▶no-cron: {gate: a, forbid", FORM),
        (
            "invariants.yaml",
            "forbid: {extension: pg_cron}",
            "▶forbid: {}",
            "name at least one of extension, schema, preload, relation",
        ),
        (
            "invariants.yaml",
            "no-blank: {query: SELECT s.name FROM public.settings AS s WHERE s.value = '', rows: 0}",
            "▶no-blank: {query: SELECT s.name FROM public.settings AS s}",
            "write exactly one of `rows`, `equals` and `unchanged`",
        ),
        ("invariants.yaml", "rows: 0", "rows: ▶-1", ...),
        (
            "invariants.yaml",
            "extension: pg_cron",
            "▶extension: {var: who}",
            "there is no variable 'who' (governance.vars and the target's: none)",
        ),
    ],
)
def test_one_problem_at_its_place(tmp_path: Path, file: str, old: str, new: str, message: str | EllipsisType) -> None:
    """▶ stands where the problem must be reported; `...` leaves its words to the tests of what makes them."""
    text = states.STATE[file]
    assert text.count(old) == 1
    text = text.replace(old, new)
    before = text[: text.index("▶")]
    place = f"{file}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}: "
    (found,) = problems(tmp_path, (file, text.replace("▶", "")))
    assert found.startswith(place)
    if isinstance(message, str):
        assert found == place + message.replace("DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("SET search_path = pg_catalog, public, pg_temp\n", "", "a function that reads a gate" + PINNED),
        ("public, pg_temp\n", "pg_temp, public\n", "a function that reads a gate" + PINNED),
        ("public, pg_temp\n", "public\nSECURITY DEFINER\n", "SECURITY DEFINER" + PINNED),
    ],
)
def test_a_path_that_is_not_pinned(tmp_path: Path, old: str, new: str, message: str) -> None:
    (found,) = problems(tmp_path, ("functions/fn_one.sql", states.SQL.replace(old, new)))
    assert found == f"functions.yaml:3:13: {message}"


def test_a_gate_needs_to_say_which_store_when_there_are_two(tmp_path: Path) -> None:
    text = states.GOVERNANCE.replace(
        "value: value}\n", "value: value}\n    more: {table: public.more, key: name, value: value}\n"
    )
    found = problems(tmp_path, ("governance.yaml", text))
    assert len(found) == 3
    assert all("`store` must say which gate store (governance.gate_stores: more, settings)" in line for line in found)
    assert [line.split(": ")[0] for line in found] == ["gates.yaml:2:3", "gates.yaml:3:3", "gates.yaml:4:3"]


def test_a_waived_rule_is_no_problem(tmp_path: Path) -> None:
    text = states.STATE["functions.yaml"].replace(
        "execute: [app_caller]", "execute: [PUBLIC]\n    waive: {public_execute: harmless, pinned_path: see above}"
    )
    found = load(tmp_path, functions__yaml=text)
    spec = found.items["function.public.fn_one(integer)"]
    assert [grant["grantee"] for grant in spec.spec.dump()["acl"]] == [None, "app_owner"]
    assert spec.rules.dump()["waived"] == ["pinned_path", "public_execute"]


def test_the_name_of_a_file_must_be_text(tmp_path: Path) -> None:
    states.write(tmp_path, states.STATE)
    bad = bytes(tmp_path / "gates") + b"\xff.yaml"
    with open(bad, "wb") as file:  # noqa: PTH123 - pathlib takes no bytes
        file.write(b"gates: {}\n")
    with pytest.raises(InputError) as refused:
        desired.load(tmp_path, None)
    (problem,) = refused.value.problems
    assert problem.message == "the name of this file is not UTF-8: rename it"


# ------------------------------------------------------------------------------------------------------------- schema


class Schema:
    """The part of JSON Schema (2020-12) that `schema` uses; a keyword that is not known here fails the test."""

    TYPES = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    WORDS = {"title", "description", "default", "$defs", "$schema"}

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root

    def faults(self, value: Json, schema: Any = None, path: str = "") -> list[str]:
        """Why `value` does not fit; empty when it does."""
        schema = self.root if schema is None else schema
        found: list[str] = []
        for word, rule in schema.items():
            if word in self.WORDS:
                continue
            applies, check = self.KEYWORDS.get(word, (None, None))
            if check is None:
                pytest.fail(f"{path}: keyword {word!r} of JSON Schema is not known here")
            if applies is None or isinstance(value, applies):
                found += check(self, value, rule, schema, path)
        return found

    def ref(self, value: Json, rule: Any, _schema: Any, path: str) -> list[str]:
        return self.faults(value, self.root["$defs"][rule.removeprefix("#/$defs/")], path)

    def any_of(self, value: Json, rule: Any, _schema: Any, path: str) -> list[str]:
        branches = [self.faults(value, branch, path) for branch in rule]
        return [] if [] in branches else [f"{path}: none of {len(rule)} forms: {branches}"]

    def type_(self, value: Json, rule: Any, _schema: Any, path: str) -> list[str]:
        number = isinstance(value, bool) and rule in {"integer", "number"}
        return [f"{path}: not {rule}"] if number or not isinstance(value, self.TYPES[rule]) else []

    def properties(self, value: Json, rule: Any, _schema: Any, path: str) -> list[str]:
        return [fault for key in value if key in rule for fault in self.faults(value[key], rule[key], f"{path}/{key}")]

    def others(self, value: Json, rule: Any, schema: Any, path: str) -> list[str]:
        keys = [key for key in value if key not in schema.get("properties", {})]
        if rule is False:
            return [f"{path}: key {key}" for key in keys]
        return (
            [] if rule is True else [fault for key in keys for fault in self.faults(value[key], rule, f"{path}/{key}")]
        )

    def items(self, value: Json, rule: Any, _schema: Any, path: str) -> list[str]:
        return [fault for index, item in enumerate(value) for fault in self.faults(item, rule, f"{path}/{index}")]

    KEYWORDS: Mapping[str, tuple[Any, Any]] = {
        "$ref": (None, ref),
        "anyOf": (None, any_of),
        "type": (None, type_),
        "enum": (None, lambda _, value, rule, __, path: [] if value in rule else [f"{path}: not in {rule}"]),
        "const": (None, lambda _, value, rule, __, path: [] if value == rule else [f"{path}: not {rule}"]),
        "properties": (dict, properties),
        "additionalProperties": (dict, others),
        "required": (dict, lambda _, value, rule, __, path: [f"{path}: no {key}" for key in rule if key not in value]),
        "minProperties": (dict, lambda _, value, rule, __, path: [] if len(value) >= rule else [f"{path}: too few"]),
        "items": (list, items),
        "minItems": (list, lambda _, value, rule, __, path: [] if len(value) >= rule else [f"{path}: too few"]),
        "pattern": (
            str,
            lambda _, value, rule, __, path: [] if re.search(rule, value) else [f"{path}: not like {rule}"],
        ),
        "minLength": (str, lambda _, value, rule, __, path: [] if len(value) >= rule else [f"{path}: too short"]),
        "minimum": ((int, float), lambda _, value, rule, __, path: [] if value >= rule else [f"{path}: too small"]),
        "maximum": ((int, float), lambda _, value, rule, __, path: [] if value <= rule else [f"{path}: too large"]),
    }


@pytest.mark.parametrize(
    "path",
    sorted([*(PROJECT / "state").glob("*.yaml"), *(PROJECT / "reconciler" / "templates").rglob("*.yaml")]),
    ids=lambda path: str(path.relative_to(PROJECT)),
)
def test_the_schema_takes_every_file_that_we_ship(path: Path) -> None:
    document, found = parse(path.read_text(), path.name)
    assert document is not None
    assert found == []
    assert Schema(desired.schema()).faults(document.data) == []


def test_the_schema_takes_what_pin_writes() -> None:
    document, _ = parse(
        "pins:\n  P1:\n    pin: {table: a.b}\n    lines: [column id uuid]\n  P2: {pin: {}, lines: []}\n", ""
    )
    assert document is not None
    assert Schema(desired.schema()).faults(document.data) == []


@pytest.mark.parametrize(
    "text",
    [
        "gaets: {}",
        "gates: {a: {value: 1, reason: r}}",
        "gates: {a: {value: '1'}}",
        "gates: {a: {value: '1', reason: r, more: 1}}",
        "gates: {a: {value: '1', reason: r, lock: maybe}}",
        "gates: []",
        "functions: {f(): {source: a.sql}}",
        "functions: {f(): {source: a.sql, owner: o, execute: all}}",
        "markers: {m: {table: a.b, key: {}}}",
        "invariants: {i: {query: SELECT 1, row: 0}}",
        "invariants: {i: {forbid: {extension: {var: 1}}}}",
        "gates: {a: {value: {vra: x}, reason: r}}",
        "governance: {version: 1, name: {var: x}, release: r, targets: {m: {}}}",
        "invariants: {i: {forbid: {extensoin: x}}}",
        "invariants: {i: {query: SELECT 1, unchanged: false}}",
        "invariants: {i: {untouched: []}}",
        "pins: {p: {pin: {table: a.b}}}",
        "pins: {p: {pin: {table: a.b}, lines: [], more: 1}}",
        "pins: {p: {pin: {table: a.b}, lines: {var: x}}}",
        "governance: {version: 2, name: a, release: r, targets: {m: {}}}",
        "governance: {version: 1, name: a, release: r}",
    ],
)
def test_the_schema_refuses_what_validate_refuses(text: str) -> None:
    document, _ = parse(text, "a.yaml")
    assert document is not None
    assert Schema(desired.schema()).faults(document.data) != []


def test_the_schema_names_every_section_and_every_definition() -> None:
    schema = desired.schema()
    assert sorted(schema["properties"]) == [
        "functions",
        "gates",
        "governance",
        "invariants",
        "markers",
        "pins",
        "proofs",
        "surface",
    ]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    text = str(schema)
    assert set(re.findall(r"#/\$defs/(\w+)", text)) == set(schema["$defs"])
