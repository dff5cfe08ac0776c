"""First step of the flow: a state directory -> Desired, offline, or every problem of every file at once.

The file names are for people: all `*.yaml` below the directory are read and merged.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from pydantic import Field

from reconciler import signatures
from reconciler.checks import checks
from reconciler.checks.proof import ProofSpec, armed, refuses
from reconciler.errors import InputError, Problem, UsageError
from reconciler.kinds import kinds
from reconciler.model import (
    ApplyPolicy,
    ApprovalPolicy,
    Check,
    Declared,
    Desired,
    GateStore,
    Json,
    Model,
    Place,
    Policy,
    Scope,
)
from reconciler.parts import Captured, Complaint, Context, own_relation
from reconciler.sql import split_identity
from reconciler.yamltext import Document, parse, read_text, validate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path


class TargetDeclaration(Model):
    """One database of `governance.targets`. `ledger`: hash of its first entry, once it has one."""

    database: str | None = None
    vars: dict[str, Json] = {}
    ledger: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


class Governance(Model):
    """The section `governance`: whose database this is, what is owned, and how it may be changed."""

    version: int = Field(ge=1, le=1)
    name: str = Field(pattern="^[a-z][a-z0-9_]{0,39}$")
    release: str = Field(min_length=1)
    targets: dict[str, TargetDeclaration] = Field(min_length=1)
    vars: dict[str, Json] = {}
    gate_stores: dict[str, GateStore] = {}
    scope: Scope = Scope()
    approval: ApprovalPolicy = ApprovalPolicy()
    apply: ApplyPolicy = ApplyPolicy()
    allow_functions: tuple[str, ...] = ()
    allow_not_judged: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """One entry of one section, where it stands."""

    file: str
    document: Document
    path: tuple[str | int, ...]
    data: Json

    def problem(self, message: str, path: tuple[str | int, ...] = (), *, value: bool = False) -> Problem:
        return self.document.problem(self.file, (*self.path, *path), message, value=value)

    @property
    def place(self) -> Place:
        line, column = self.document.places[self.path]
        return Place(self.file, line, column)


def load(directory: Path, target: str | None, *, capturing: bool = False) -> Desired:
    """Everything the files of `directory` say for one target, variables filled in.

    target: a name of `governance.targets`; None means the only one. capturing: pins need no lines yet.
    Raises InputError with every problem of every file, UsageError for a target that is not there.
    """
    sections, governance, problems, source = _parsed(directory)
    if governance is None:
        # Without the stores and the policy nothing else can be judged; what can be said of the rest was said.
        raise InputError(_in_order(problems))
    return _resolved(
        directory, sections, governance, _target(governance, target), problems, source, capturing=capturing
    )


def load_all(directory: Path) -> list[Desired]:
    """The same for every target. Raises InputError with every problem of every file, each once."""
    sections, governance, problems, source = _parsed(directory)
    if governance is None:
        raise InputError(_in_order(problems))
    loaded: list[Desired] = []
    found: list[Problem] = []
    for target in governance.targets:
        try:
            loaded.append(_resolved(directory, sections, governance, target, problems, source))
        except InputError as error:
            found += error.problems
    if found:
        raise InputError(_in_order(found))
    return loaded


def _parsed(directory: Path) -> tuple[dict[str, dict[str, _Entry]], Governance | None, list[Problem], str]:
    documents, problems, source = _documents(directory)
    sections, found = _merge(documents)
    problems += found
    if not documents:
        return sections, None, problems, source
    governance, found = _governance(sections.get("governance", {}), directory)
    return sections, governance, [*problems, *found], source


def _resolved(  # noqa: PLR0913, PLR0917 - what was parsed, for one target
    directory: Path,
    sections: Mapping[str, Mapping[str, _Entry]],
    governance: Governance,
    chosen: str,
    problems: list[Problem],
    source: str,
    *,
    capturing: bool = False,
) -> Desired:
    variables = {**governance.vars, **governance.targets[chosen].vars}
    policy = Policy(
        approval=governance.approval,
        apply=governance.apply,
        allow_functions=governance.allow_functions,
        allow_not_judged=governance.allow_not_judged,
    )
    approvers, found = _approvers(directory, governance, sections["governance"]["governance"])
    problems += found
    pins, unpinned = _pins(sections)
    context = Context(root=directory, stores=governance.gate_stores, policy=policy, pins=pins, capturing=capturing)
    items, found = _items(sections, variables, context)
    judged, more = _checks(sections, variables, context, items)
    more += _gates_proven(items, judged, sections) + _armed_exist(judged, sections)
    if problems or unpinned or found or more:
        raise InputError(_in_order([*problems, *unpinned, *found, *more]))
    return Desired(
        name=governance.name,
        release=governance.release,
        target=chosen,
        database=governance.targets[chosen].database,
        ledger=governance.targets[chosen].ledger,
        policy=policy,
        approvers=approvers,
        scope=governance.scope,
        stores=governance.gate_stores,
        items=dict(sorted(items.items())),
        checks=dict(sorted(judged.items())),
        source_digest=source,
    )


def _approvers(directory: Path, governance: Governance, entry: _Entry) -> tuple[str, list[Problem]]:
    """The text of the file that says who may approve, and everything that is wrong with it."""
    policy, path = governance.approval, ("approval", "approvers")
    if policy.approvers is None:
        if policy.signed:
            message = (
                "`signed: true` needs `approvers`: a file in OpenSSH's allowed_signers format that says who may approve"
            )
            return "", [entry.problem(message, ("approval",))]
        return "", []
    file = directory / policy.approvers
    text, problems = read_text(file, directory)
    if text is None:
        return "", [entry.problem(str(problem), path, value=True) for problem in problems]
    problems = [Problem(str(file), line, None, sentence) for line, sentence in signatures.problems(text)]
    known = signatures.fingerprints(text)
    if not known and not problems:
        problems.append(Problem(str(file), None, None, "there is nobody in it"))
    needed, most = policy.needed(policy.for_), signatures.most(text, signatures.APPROVAL)
    if most is not None and most < needed and not problems:
        message = f"{needed} approvals are required, and {file} lets {most} principals with keys of their own approve"
        problems.append(entry.problem(message, ("approval",)))
    for number, name in enumerate(policy.break_glass):
        if name not in known:
            message = f"{name!r} is no principal of {file}"
            problems.append(entry.problem(message, ("approval", "break_glass", number), value=True))
    return signatures.plain(text), problems


def targets(directory: Path) -> frozenset[str]:
    """The names of `governance.targets`. The directory is one that `load` takes."""
    _, governance, _, _ = _parsed(directory)
    return frozenset(governance.targets if governance is not None else ())


def sources(directory: Path) -> dict[str, Path]:
    """The file of every declared function, by its identity. The directory is one that `load` takes."""
    sections, _, _, _ = _parsed(directory)
    declared = sections.get("functions", {}).items()
    return {name: directory / entry.data["source"] for name, entry in declared if not _retired(entry)}


def schema() -> dict[str, Json]:
    """JSON Schema of a state file, for editors: every section with its entries."""
    definitions: dict[str, Json] = {}

    def of(model: type[Model]) -> Json:
        body = model.model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
        definitions.update(body.pop("$defs", {}))
        return body

    governance, pins = of(Governance), of(Captured)
    common, definitions = definitions, {}
    properties: dict[str, Json] = {}
    for kind in kinds().values():
        forms = {"anyOf": [*map(of, kind.forms()), of(kind.Retirement)]}
        properties[kind.section] = {"type": "object", "additionalProperties": forms}
    for check in checks().values():
        forms = [of(form) for form in check.forms()]
        properties[check.section] = {"type": "object", "additionalProperties": {"anyOf": forms}}
    # Everywhere but in governance itself, and in what `reconciler pin` writes, a value may be a variable.
    properties = {section: _fillable(body) for section, body in properties.items()}
    definitions = {name: _fillable(body) for name, body in definitions.items()}
    definitions |= common
    definitions["Variable"] = {
        "type": "object",
        "properties": {"var": {"type": "string"}},
        "required": ["var"],
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "reconciler state",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "governance": governance,
            **properties,
            "pins": {"type": "object", "additionalProperties": pins},
        },
        "$defs": definitions,
    }


def _fillable(schema: dict[str, Json]) -> dict[str, Json]:
    """The schema with `{var: name}` allowed in the place of each value below."""

    def either(value: dict[str, Json]) -> dict[str, Json]:
        return {"anyOf": [_fillable(value), {"$ref": "#/$defs/Variable"}]}

    result = dict(schema)
    if "properties" in schema:
        result["properties"] = {name: either(value) for name, value in schema["properties"].items()}
    for word in ("additionalProperties", "items"):
        if isinstance(schema.get(word), dict):
            result[word] = either(schema[word])
    if "anyOf" in schema:
        result["anyOf"] = [_fillable(branch) for branch in schema["anyOf"]]
    return result


def _in_order(problems: Iterable[Problem]) -> list[Problem]:
    return sorted(
        set(problems), key=lambda problem: (problem.file, problem.line or 0, problem.column or 0, problem.message)
    )


def _documents(directory: Path) -> tuple[dict[str, Document], list[Problem], str]:
    """Every YAML file below the directory, parsed; problems; and the digest of all files that could be read."""
    if not directory.is_dir():
        raise UsageError(
            f"There is no state directory {directory}.",
            hint="Name it with --state, or make one with `reconciler init`.",
        )
    documents: dict[str, Document] = {}
    problems: list[Problem] = []
    sha = hashlib.sha256()
    files = sorted(path for path in directory.rglob("*") if path.suffix in {".yaml", ".yml", ".sql"})
    for path in files:
        name = str(path)
        if not _is_text(path.relative_to(directory)):
            problems.append(Problem(name, None, None, "the name of this file is not UTF-8: rename it"))
            continue
        if path.suffix == ".yml":
            problems.append(Problem(name, None, None, "only *.yaml is read: rename it, so that nothing goes unseen"))
            continue
        text, found = read_text(path, directory)
        if path.suffix == ".sql":
            # Named by functions, which say what is wrong with it; here it only counts for the digest.
            text, found = text or "", []
        problems += found
        if text is None:
            continue
        sha.update(f"{path.relative_to(directory)}\0{len(text)}\0{text}".encode())
        if path.suffix == ".yaml":
            document, found = parse(text, name)
            problems += found
            if document is not None:
                documents[name] = document
    if not documents and not problems:
        problems.append(
            Problem(
                str(directory), None, None, "no *.yaml file here; `reconciler init` writes a directory to start from"
            )
        )
    return documents, problems, sha.hexdigest()


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _merge(documents: Mapping[str, Document]) -> tuple[dict[str, dict[str, _Entry]], list[Problem]]:
    """Section -> name -> entry over all files; a name in two places is a problem that names both."""
    known = [
        "governance",
        "pins",
        *(kind.section for kind in kinds().values()),
        *(check.section for check in checks().values()),
    ]
    sections: dict[str, dict[str, _Entry]] = {}
    problems: list[Problem] = []
    for file, document in documents.items():
        top = cast("dict[str, Json]", document.data or {})
        for section, body in top.items():
            if section not in known:
                near = difflib.get_close_matches(section, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"sections: {', '.join(known)}"
                problems.append(document.problem(file, (section,), f"unknown section {section!r}; {hint}"))
                continue
            if section == "governance":
                entries: dict[str, Json] = {"governance": body}
            elif body is None:
                entries = {}
            elif isinstance(body, dict):
                entries = cast("dict[str, Json]", body)
            else:
                message = f"section {section!r} must be a mapping of names to entries"
                problems.append(document.problem(file, (section,), message, value=True))
                continue
            seen = sections.setdefault(section, {})
            for name, data in entries.items():
                path = (section,) if section == "governance" else (section, name)
                entry = _Entry(file, document, path, data)
                if name in seen:
                    where = "section governance" if section == "governance" else f"{section}.{name}"
                    problems.append(entry.problem(f"{where} is already declared at {seen[name].place}"))
                else:
                    seen[name] = entry
    return sections, problems


def _governance(entries: Mapping[str, _Entry], directory: Path) -> tuple[Governance | None, list[Problem]]:
    entry = entries.get("governance")
    if entry is None:
        return None, [Problem(str(directory), None, None, "no file has the section `governance`")]
    governance, problems = validate(Governance, entry.document, entry.path, entry.data, entry.file)
    if governance is None:
        return None, problems
    for name, store in governance.gate_stores.items():
        problems += _qualified(entry, ("gate_stores", name, "table"), store.table)
    for index, scope in enumerate(governance.scope.markers):
        problems += _qualified(entry, ("scope", "markers", index, "table"), scope.table)
    for index, scope in enumerate(governance.scope.gates):
        if scope.store not in governance.gate_stores:
            message = f"gate store {scope.store!r} is not declared in governance.gate_stores"
            problems.append(entry.problem(message, ("scope", "gates", index, "store"), value=True))
    return governance, problems


def _pins(sections: Mapping[str, Mapping[str, _Entry]]) -> tuple[dict[str, Captured], list[Problem]]:
    pins: dict[str, Captured] = {}
    problems: list[Problem] = []
    known = sections.get("invariants", {})
    for name, entry in sections.get("pins", {}).items():
        captured, found = validate(Captured, entry.document, entry.path, entry.data, entry.file)
        problems += found
        if captured is not None:
            pins[name] = captured
        if name not in known:
            problems.append(entry.problem(f"no invariant {name!r} pins this; run `reconciler pin` again"))
    return pins, problems


def _qualified(entry: _Entry, path: tuple[str | int, ...], text: str) -> list[Problem]:
    try:
        own_relation(text)
    except ValueError as error:
        return [entry.problem(str(error), path, value=True)]
    return []


def _target(governance: Governance, target: str | None) -> str:
    names = sorted(governance.targets)
    if target is None:
        if len(names) > 1:
            raise UsageError(f"Which target? The files have {', '.join(names)}.", hint="Name one with --target.")
        return names[0]
    if target not in governance.targets:
        near = difflib.get_close_matches(target, names, 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"The files have {', '.join(names)}."
        raise UsageError(f"There is no target {target!r}.", hint=hint)
    return target


def _fill(entry: _Entry, variables: Mapping[str, Json], problems: list[Problem]) -> Json:
    """The entry's data with every `{var: name}` replaced by the variable."""

    def walk(data: Json, path: tuple[str | int, ...]) -> Json:
        if isinstance(data, dict):
            mapping = cast("dict[str, Json]", data)
            if list(mapping) == ["var"] and isinstance(mapping["var"], str):
                if mapping["var"] not in variables:
                    known = ", ".join(sorted(variables)) or "none"
                    message = f"there is no variable {mapping['var']!r} (governance.vars and the target's: {known})"
                    problems.append(entry.problem(message, path))
                return variables.get(mapping["var"])
            return {key: walk(value, (*path, key)) for key, value in mapping.items()}
        if isinstance(data, list):
            values = cast("list[Json]", data)
            return [walk(value, (*path, index)) for index, value in enumerate(values)]
        return data

    return walk(entry.data, ())


def _placed(entry: _Entry, complaints: Iterable[Complaint | Problem]) -> list[Problem]:
    return [
        entry.problem(found.message, found.path, value=bool(found.path)) if isinstance(found, Complaint) else found
        for found in complaints
    ]


def _items(
    sections: Mapping[str, Mapping[str, _Entry]], variables: Mapping[str, Json], context: Context
) -> tuple[dict[str, Declared], list[Problem]]:
    items: dict[str, Declared] = {}
    problems: list[Problem] = []
    for kind in kinds().values():
        for name, entry in sections.get(kind.section, {}).items():
            before = len(problems)
            data = _fill(entry, variables, problems)
            if len(problems) > before:
                continue
            retired = _retired(entry)
            form = kind.Retirement if retired else kind.form(data)
            declaration, found = validate(form, entry.document, entry.path, data, entry.file)
            problems += found
            if declaration is None:
                continue
            problems += _gates_exist(entry, getattr(declaration, "gates", ()), sections.get("gates", {}))
            resolve = kind.retire if retired else kind.declare
            spec, rules, complaints = resolve(name, declaration, replace(context, items=items))
            problems += _placed(entry, complaints)
            if spec is not None and rules is not None:
                item = Declared(kind.name, name, spec, rules, entry.place)
                items[item.address] = item
    return items, problems


def _retired(entry: _Entry) -> bool:
    """Does the entry say that its object is to go?"""
    return isinstance(entry.data, dict) and "retire" in cast("dict[str, Json]", entry.data)


def _is_secret(entry: _Entry) -> bool:
    """Does the entry say that its value stands in no file?"""
    return isinstance(entry.data, dict) and bool(cast("dict[str, Json]", entry.data).get("secret"))


def _gates_exist(entry: _Entry, gates: Sequence[str], known: Mapping[str, _Entry]) -> list[Problem]:
    """A function may only name gates that are declared: a misspelt gate would guard nothing, nor does a retired one."""
    problems: list[Problem] = []
    for index, gate in enumerate(gates):
        if gate in known and _retired(known[gate]):
            message = f"gate {gate!r} is retired at {known[gate].place}"
            problems.append(entry.problem(message, ("gates", index), value=True))
        elif gate in known and _is_secret(known[gate]):
            message = f"gate {gate!r} is a secret: no proof may arm it, and no refusal may name its value"
            problems.append(entry.problem(message, ("gates", index), value=True))
        if gate not in known:
            near = difflib.get_close_matches(gate, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(entry.problem(f"gate {gate!r} is not declared{hint}", ("gates", index), value=True))
    return problems


def _gates_proven(
    items: Mapping[str, Declared], judged: Mapping[str, Check], sections: Mapping[str, Mapping[str, _Entry]]
) -> list[Problem]:
    """A missing check is a failure (rule 14): some proof shows of each gate that it makes the function refuse."""
    specs = [check.spec for check in judged.values() if isinstance(check.spec, ProofSpec)]
    if len(specs) < len(sections.get("proofs", {})):
        return []  # what the others prove is not known before they are right
    problems: list[Problem] = []
    for item in items.values():
        gates: tuple[str, ...] = getattr(item.rules, "gates", ())
        for index, gate in enumerate(gates):
            schema, name, arguments = split_identity(item.name)
            declared = gate in sections.get("gates", {})
            if declared and not any(refuses(spec, schema, name, len(arguments), gate) for spec in specs):
                message = f"no proof shows that {schema}.{name} refuses with a reason `{gate}=…`"
                entry = sections["functions"][item.name]
                problems.append(entry.problem(message, ("gates", index), value=True))
    return problems


def _armed_exist(judged: Mapping[str, Check], sections: Mapping[str, Mapping[str, _Entry]]) -> list[Problem]:
    """A proof may only arm gates that are declared, and that a file may name a value of."""
    problems: list[Problem] = []
    for check in judged.values():
        for number, gate in armed(check.spec) if isinstance(check.spec, ProofSpec) else ():
            known = sections.get("gates", {})
            if gate not in known or _retired(known[gate]) or _is_secret(known[gate]):
                entry = sections["proofs"][check.name]
                where = ("steps", number) if "steps" in entry.data else ()
                what = "not declared" if gate not in known else "retired" if _retired(known[gate]) else "a secret"
                problems.append(entry.problem(f"gate {gate!r} is {what}", (*where, "arm", gate)))
    return problems


def _checks(
    sections: Mapping[str, Mapping[str, _Entry]],
    variables: Mapping[str, Json],
    context: Context,
    items: Mapping[str, Declared],
) -> tuple[dict[str, Check], list[Problem]]:
    judged: dict[str, Check] = {}
    problems: list[Problem] = []
    for check in checks().values():
        for name, entry in sections.get(check.section, {}).items():
            before = len(problems)
            data = _fill(entry, variables, problems)
            if len(problems) > before:
                continue
            form, message = check.form(data)
            if form is None:
                problems.append(entry.problem(message))
                continue
            declaration, found = validate(form, entry.document, entry.path, data, entry.file)
            problems += found
            if declaration is None:
                continue
            spec, complaints = check.declare(name, declaration, context, items)
            problems += _placed(entry, complaints)
            if spec is not None:
                one = Check(check.name, name, spec, entry.place)
                judged[one.address] = one
    return judged, problems
