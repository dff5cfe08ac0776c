"""SQL text without a database: what a CREATE FUNCTION or PROCEDURE statement says, and the names of routines.

`desired` reads function files with `parse_routine` and `check_body`; `kinds.function` names and compares with the same
functions, so that a file and the catalog have one form. Declared queries are judged by `allowlist`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from postgast import PgQueryError, parse_plpgsql
from postgast import pg_query_pb2 as pb

from reconciler.defaults import canonical_default, float4
from reconciler.model import Model, Number
from reconciler.syntax import (
    Trouble,
    UnknownType,
    at,
    location_of,
    quote_ident,
    shifted,
    single,
    statements_of,
    strings,
    tokens_of,
    type_name,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Mode = Literal["in", "out", "inout", "variadic", "table"]

MODES: Mapping[int, Mode] = {
    pb.FUNC_PARAM_DEFAULT: "in",
    pb.FUNC_PARAM_IN: "in",
    pb.FUNC_PARAM_OUT: "out",
    pb.FUNC_PARAM_INOUT: "inout",
    pb.FUNC_PARAM_VARIADIC: "variadic",
    pb.FUNC_PARAM_TABLE: "table",
}
INPUT_MODES: tuple[Mode, ...] = ("in", "inout", "variadic")

LIST_SETTINGS = frozenset(
    """
    createrole_self_grant datestyle debug_io_direct listen_addresses local_preload_libraries log_connections
    log_destination oauth_validator_libraries restrict_nonsystem_relation_kind search_path session_preload_libraries
    shared_preload_libraries synchronized_standby_slots synchronous_standby_names temp_tablespaces
    unix_socket_directories wal_consistency_checking
    """.split()
)
"""Settings that take a list (GUC_LIST_INPUT in guc_tables.c)."""

QUOTED_SETTINGS = frozenset(
    """
    local_preload_libraries search_path session_preload_libraries shared_preload_libraries temp_tablespaces
    unix_socket_directories
    """.split()
)
"""Those of them whose elements are identifiers, which PostgreSQL stores quoted (GUC_LIST_QUOTE)."""

SETTING_NAMES = {"datestyle": "DateStyle", "intervalstyle": "IntervalStyle", "timezone": "TimeZone"}
"""The settings that PostgreSQL stores with capitals, however they were written."""


class Arg(Model):
    """One argument, as pg_proc keeps it: the type without length, as format_type prints it with empty search_path."""

    name: str | None
    mode: Mode
    type: str
    default: str | None


class Routine(Model):
    """Everything that one CREATE FUNCTION or PROCEDURE statement says, with PostgreSQL's defaults filled in."""

    schema_name: str
    name: str
    kind: Literal["function", "procedure", "window"]
    args: tuple[Arg, ...]
    returns: str | None
    returns_set: bool
    language: str
    volatility: Literal["volatile", "stable", "immutable"]
    security_definer: bool
    parallel: Literal["unsafe", "restricted", "safe"]
    strict: bool
    leakproof: bool
    cost: Number
    rows: Number
    support: str | None
    transforms: tuple[str, ...]
    config: tuple[str, ...]
    body: str
    binary: str | None
    sql_body: bool = False
    """The body is SQL of the statement itself (BEGIN ATOMIC or RETURN): the catalog keeps it parsed."""


def parse_routine(text: str) -> tuple[Routine | None, list[Trouble]]:
    """The one CREATE [OR REPLACE] FUNCTION or PROCEDURE of `text`, or everything that is wrong with it.

    Refused because the catalog would show another text, or because it means something else under another path: a name
    or type without schema, %TYPE, SET ... FROM CURRENT. A body in SQL syntax, and a default that is not constant, are
    taken as they are written; what the catalog makes of them only an apply can learn.
    """
    statement, troubles = single(text)
    if statement is None:
        return None, troubles
    if not statement.node.HasField("create_function_stmt"):
        return None, [at(text, statement.start, "a CREATE FUNCTION or CREATE PROCEDURE statement is expected here")]
    reader = _RoutineReader(text, statement.node.create_function_stmt, statement.start)
    routine = reader.read()
    return (None, sorted(reader.troubles, key=_place)) if reader.troubles else (routine, [])


def _place(trouble: Trouble) -> tuple[int, int]:
    return trouble.line or 0, trouble.column or 0


class _RoutineReader:
    """Reads one tree and collects its troubles; where something is wrong it goes on with a stand-in."""

    def __init__(self, text: str, tree: pb.CreateFunctionStmt, start: int) -> None:
        self.text = text
        self.tree = tree
        self.start = start
        self.troubles: list[Trouble] = []
        self.options: dict[str, pb.DefElem] = {}
        self.settings: list[pb.DefElem] = []

    def refuse(self, location: int, message: str) -> None:
        self.troubles.append(at(self.text, location if location >= 0 else self.start, message))

    def read(self) -> Routine:
        """The routine as far as it could be read; without meaning when there are troubles."""
        tree = self.tree
        names = strings(tree.funcname)
        if len(names) != 2:
            name = ".".join(quote_ident(part) for part in names)
            self.refuse(self.start, f"{name} must be named with its schema: schema.{quote_ident(names[-1])}")
        self.sort_options()
        args = tuple(self.argument(node.function_parameter) for node in tree.parameters)
        self.check_arguments(args)
        returns, returns_set = self.result(args)
        sql_body = tree.HasField("sql_body")
        language = self.word("language", "sql" if sql_body else "")
        if not language:
            self.refuse(self.start, "no LANGUAGE is given")
        body, binary = self.body(language, names[-1])
        window = self.flag("window")
        return Routine(
            schema_name=names[0],
            name=names[-1],
            kind="procedure" if tree.is_procedure else "window" if window else "function",
            args=args,
            returns=returns,
            returns_set=returns_set,
            language=language,
            volatility=cast("Literal['volatile', 'stable', 'immutable']", self.word("volatility", "volatile")),
            security_definer=self.flag("security"),
            parallel=self.parallel(),
            strict=self.flag("strict"),
            leakproof=self.flag("leakproof"),
            cost=self.amount("cost", 1 if language in ("internal", "c") else 100),
            rows=self.rows(returns_set),
            support=self.support(),
            transforms=self.transforms(),
            config=self.config(),
            body=body,
            binary=binary,
            sql_body=sql_body,
        )

    def sort_options(self) -> None:
        """Each option once, except SET."""
        for node in self.tree.options:
            option = node.def_elem
            if option.defname == "set":
                self.settings.append(option)
            elif option.defname in self.options:
                self.refuse(option.location, f"{option.defname.upper()} is given twice")
            elif self.tree.is_procedure and option.defname not in ("language", "transform", "security", "as"):
                self.refuse(option.location, "a procedure cannot have this attribute")
            else:
                self.options[option.defname] = option

    def type_text(self, node: pb.TypeName) -> str:
        try:
            return type_name(node)
        except UnknownType as unknown:
            self.refuse(unknown.location, unknown.message)
            return "unknown"

    def argument(self, node: pb.FunctionParameter) -> Arg:
        mode = MODES[node.mode]
        type_text = self.type_text(node.arg_type)
        if node.arg_type.setof:
            self.refuse(node.arg_type.location, "an argument cannot be a set")
        default = None
        if node.HasField("defexpr"):
            default = self.default(node, type_text)
            if mode not in INPUT_MODES:
                self.refuse(location_of(node.defexpr), "only input arguments can have a default")
        return Arg(name=node.name or None, mode=mode, type=type_text, default=default)

    def default(self, node: pb.FunctionParameter, type_text: str) -> str | None:
        """The default as `canonical_default` writes it; one that has no such text, as it is written."""
        start, end = self.default_span(node)
        expression = self.text.encode()[start:end].decode().strip()
        return canonical_default(expression, type_text) or expression

    def default_span(self, node: pb.FunctionParameter) -> tuple[int, int]:
        """Where the text of a default begins and ends, in bytes: after DEFAULT or =, up to its comma or parenthesis."""
        tokens, _ = tokens_of(self.text)
        depth = 0
        start = -1
        for token in tokens:
            if token.start < node.location:
                continue
            if start < 0:
                if token.token in (pb.Token.DEFAULT, pb.Token.ASCII_61):
                    start = token.end
            elif depth == 0 and token.token in (pb.Token.ASCII_44, pb.Token.ASCII_41):
                return start, token.start
            elif token.token in (pb.Token.ASCII_40, pb.Token.ASCII_91):
                depth += 1
            elif token.token in (pb.Token.ASCII_41, pb.Token.ASCII_93):
                depth -= 1
        return start, len(self.text.encode())

    def check_arguments(self, args: Sequence[Arg]) -> None:
        """The rules of interpret_function_parameter_list()."""
        defaulted = False
        for position, (arg, node) in enumerate(zip(args, self.tree.parameters, strict=True)):
            location = node.function_parameter.location
            if arg.mode == "variadic":
                if any(later.mode in INPUT_MODES for later in args[position + 1 :]):
                    self.refuse(location, "a VARIADIC argument must be the last input argument")
                if not arg.type.endswith("[]") and arg.type not in ('"any"', "anyarray", "anycompatiblearray"):
                    self.refuse(location, "a VARIADIC argument must be an array")
            if arg.mode in INPUT_MODES:
                if defaulted and not node.function_parameter.HasField("defexpr"):
                    self.refuse(location, "input arguments after one with a default need defaults too")
                defaulted = defaulted or node.function_parameter.HasField("defexpr")
            if arg.name and any(_same_argument(arg, earlier) for earlier in args[:position]):
                self.refuse(location, f"argument name {quote_ident(arg.name)} is used more than once")

    def result(self, args: Sequence[Arg]) -> tuple[str | None, bool]:
        """pg_proc.prorettype and proretset; a procedure returns nothing here, whatever its OUT arguments are."""
        outputs = [arg.type for arg in args if arg.mode in ("out", "inout")]
        if self.tree.is_procedure:
            return None, False
        implied = (outputs[0] if len(outputs) == 1 else "record") if outputs else None
        if not self.tree.HasField("return_type"):
            if implied is None:
                self.refuse(self.start, "RETURNS is missing")
            return implied, False
        stated = self.type_text(self.tree.return_type)
        if implied not in (None, stated, "unknown"):
            message = f"the result type must be {implied} because of the OUT arguments"
            self.refuse(self.tree.return_type.location, message)
        return stated, self.tree.return_type.setof

    def word(self, option: str, default: str) -> str:
        return self.options[option].arg.string.sval if option in self.options else default

    def flag(self, option: str) -> bool:
        return option in self.options and self.options[option].arg.boolean.boolval

    def amount(self, option: str, default: float) -> float:
        """COST or ROWS as the float4 column of pg_proc gives it back."""
        if option not in self.options:
            return float(default)
        node = self.options[option].arg
        value = float(node.float.fval) if node.HasField("float") else float(node.integer.ival)
        if not 0 < value < 1e37:
            self.refuse(self.options[option].location, f"{option.upper()} must be a positive number")
            return float(default)
        return float4(value)

    def rows(self, returns_set: bool) -> float:
        if "rows" in self.options and not returns_set:
            self.refuse(self.options["rows"].location, "ROWS is only for functions that return a set")
        return self.amount("rows", 1000) if returns_set else 0.0

    def parallel(self) -> Literal["unsafe", "restricted", "safe"]:
        word = self.word("parallel", "unsafe")
        if word not in ("unsafe", "restricted", "safe"):
            self.refuse(self.options["parallel"].location, "PARALLEL must be SAFE, RESTRICTED or UNSAFE")
            return "unsafe"
        return word

    def support(self) -> str | None:
        if "support" not in self.options:
            return None
        names = strings(self.options["support"].arg.list.items)
        if len(names) != 2:
            message = "SUPPORT must name its function with the schema: schema.function"
            self.refuse(self.options["support"].location, message)
        return ".".join(quote_ident(name) for name in names)

    def transforms(self) -> tuple[str, ...]:
        if "transform" not in self.options:
            return ()
        return tuple(self.type_text(item.type_name) for item in self.options["transform"].arg.list.items)

    def config(self) -> tuple[str, ...]:
        """pg_proc.proconfig: the last SET of a name wins, at the place of the first (update_proconfig_value)."""
        found: dict[str, str] = {}
        for option in self.settings:
            statement = option.arg.variable_set_stmt
            name = _setting_name(statement.name)
            match statement.kind:
                case pb.VAR_SET_VALUE:
                    found[name] = self.setting(statement, option.location)
                case pb.VAR_SET_DEFAULT | pb.VAR_RESET:
                    found.pop(name, None)
                case pb.VAR_RESET_ALL:
                    found.clear()
                case pb.VAR_SET_CURRENT:
                    message = f"SET {name} FROM CURRENT takes its value from the session; write the value"
                    self.refuse(option.location, message)
                case _:
                    self.refuse(option.location, "only SET name TO value is allowed here")
        return tuple(f"{name}={value}" for name, value in found.items())

    def setting(self, statement: pb.VariableSetStmt, location: int) -> str:
        """The value as flatten_set_variable_args() stores it."""
        name = statement.name.lower()
        if len(statement.args) > 1 and name not in LIST_SETTINGS:
            self.refuse(location, f"SET {statement.name} takes only one value")
        values: list[str] = []
        for node in statement.args:
            constant = node.a_const
            match constant.WhichOneof("val") if node.HasField("a_const") else None:
                case "ival":
                    values.append(str(constant.ival.ival))
                case "fval":
                    values.append(constant.fval.fval)
                case "sval":
                    value = constant.sval.sval
                    values.append(quote_ident(value) if name in QUOTED_SETTINGS else value)
                case _:
                    self.refuse(location, f"the value of {statement.name} must be a plain constant")
        return ", ".join(values)

    def body(self, language: str, name: str) -> tuple[str, str | None]:
        """pg_proc.prosrc and probin, by the rules of interpret_AS_clause()."""
        if self.tree.HasField("sql_body"):
            if "as" in self.options or language != "sql":
                self.refuse(self.start, "a body in SQL syntax goes with LANGUAGE sql and without AS")
            return self.sql_body(), None
        if "as" not in self.options:
            self.refuse(self.start, "no body is given")
            return "", None
        parts = strings(self.options["as"].arg.list.items)
        if language == "c":
            symbol = parts[1] if len(parts) == 2 and parts[1] != "-" else name
            return symbol, parts[0]
        if len(parts) != 1:
            self.refuse(self.options["as"].location, f"language {language} takes only one string after AS")
        return (name if language == "internal" and not parts[0] else parts[0]), None

    def sql_body(self) -> str:
        """The text from RETURN or BEGIN ATOMIC to its end: it is the last clause of the statement."""
        tokens = [token for token in tokens_of(self.text)[0] if token.token not in COMMENTS]
        depth = 0
        for token, following in zip(tokens, [*tokens[1:], tokens[-1]], strict=True):
            depth += {pb.Token.ASCII_40: 1, pb.Token.ASCII_41: -1}.get(token.token, 0)
            atomic = token.token == pb.Token.BEGIN_P and following.token == pb.Token.ATOMIC
            if depth == 0 and (token.token == pb.Token.RETURN or atomic):
                end = tokens[-2] if tokens[-1].token == pb.Token.ASCII_59 else tokens[-1]
                return self.text.encode()[token.start : end.end].decode()
        raise AssertionError


def _setting_name(written: str) -> str:
    """The name as guc.c has it: what has no dot is a setting of the server, whose names differ by case in three."""
    if "." in written:
        return written
    return SETTING_NAMES.get(written.lower(), written.lower())


def _same_argument(arg: Arg, earlier: Arg) -> bool:
    """Whether two arguments clash: an input and an output of one name do not, they live in different lists."""
    if arg.name != earlier.name:
        return False
    inputs, outputs = ("in", "variadic"), ("out", "table")
    modes = (arg.mode, earlier.mode)
    return not any(one in inputs and other in outputs for one, other in (modes, modes[::-1]))


def identity(schema: str, name: str, args: Sequence[Arg]) -> str:
    """`public.fn(text, integer)`: oid::regprocedure with empty search_path, and a space after each comma.

    Only input arguments (pg_proc.proargtypes) are part of it, for procedures too.
    """
    types = ", ".join(arg.type for arg in args if arg.mode in INPUT_MODES)
    return f"{quote_ident(schema)}.{quote_ident(name)}({types})"


def parse_identity(text: str) -> tuple[str | None, list[Trouble]]:
    """The one form of what a person wrote as `schema.name(types)`, or what is wrong with it."""
    parts, troubles = _identity_parts(text)
    if parts is None:
        return None, list(troubles)
    schema, name, types = parts
    return f"{quote_ident(schema)}.{quote_ident(name)}({', '.join(types)})", []


def split_identity(text: str) -> tuple[str, str, tuple[str, ...]]:
    """Schema and name without quotes, and the argument types, of an identity. Raises ValueError for anything else."""
    parts, troubles = _identity_parts(text)
    if parts is None:
        raise ValueError(f"{text}: {troubles[0].message}")
    return parts


@lru_cache(maxsize=4096)
def _identity_parts(text: str) -> tuple[tuple[str, str, tuple[str, ...]] | None, list[Trouble]]:
    prefix = "DROP ROUTINE "
    statement, troubles = single(prefix + text)
    if statement is None:
        return None, [shifted(trouble, len(prefix)) for trouble in troubles]
    drop = statement.node.drop_stmt
    plain = drop.behavior == pb.DROP_RESTRICT and not drop.missing_ok
    if not statement.node.HasField("drop_stmt") or len(drop.objects) != 1 or not plain:
        return None, [Trouble(1, 1, "write one routine as schema.name(argument types)")]
    routine = drop.objects[0].object_with_args
    names = strings(routine.objname)
    if routine.args_unspecified:
        return None, [Trouble(1, 1, f"write the argument types too: {text.strip()}(...)")]
    if len(names) != 2:
        return None, [Trouble(1, 1, "write the name with its schema: schema.name(argument types)")]
    try:
        types = tuple(type_name(node.type_name) for node in routine.objargs)
    except UnknownType as unknown:
        return None, [shifted(at(prefix + text, unknown.location, unknown.message), len(prefix))]
    return (names[0], names[1], types), []


NOT_THE_AUTHORS = re.compile(
    r"""
    Not\ implemented | cache\ lookup\ failed | type\ .*does\ not\ exist
    | has\ pseudo-type\ | is\ not\ a\ scalar\ variable | record\ variable\ cannot\ be\ part
    | VARIADIC\ parameter\ must\ be\ an\ array
    """,
    re.VERBOSE,
)
"""What postgast 0.2 says of types that it cannot know: it takes a variable of another type for a record.

Whether a VARIADIC argument is an array is judged by `parse_routine`."""


STRINGS = (pb.Token.SCONST, pb.Token.USCONST)
COMMENTS = (pb.Token.SQL_COMMENT, pb.Token.C_COMMENT)


class Body(NamedTuple):
    """The body of a routine: its text; where it stands in the file with its quotes, and where it starts (bytes)."""

    text: str
    token: tuple[int, int]
    start: int


def check_body(text: str) -> tuple[list[Trouble], bool]:
    """What PostgreSQL's parsers say, offline, against the body of the one CREATE statement of `text`.

    The second value says whether the body was checked: False for languages other than SQL and PL/pgSQL, and where the
    parser would need to know a type of another schema. Lines are those of `text`; a column is given for SQL only.
    """
    statement, troubles = single(text)
    if statement is None or not statement.node.HasField("create_function_stmt"):
        return troubles, False
    options = {node.def_elem.defname: node.def_elem for node in statement.node.create_function_stmt.options}
    if "language" not in options or "as" not in options:
        return [], False
    body = body_of(text, options["as"])
    match options["language"].arg.string.sval:
        case "sql":
            return [_in_file(text, body, trouble) for trouble in statements_of(body.text)[1]], True
        case "plpgsql":
            return _check_plpgsql(text, body)
        case _:
            return [], False


def body_of(text: str, option: pb.DefElem) -> Body:
    """The string after AS of a CREATE FUNCTION; `option` is the AS option of its tree."""
    after = (token for token in tokens_of(text)[0] if token.start >= option.location and token.token in STRINGS)
    token = next(after)
    opening = re.match(rb"\$[^$]*\$|[eE]?'|[uU]&'", text.encode()[token.start : token.end])
    start = token.start + (len(opening[0]) if opening is not None else 0)
    return Body(strings(option.arg.list.items)[0], (token.start, token.end), start)


def dollar_quoted(body: str, tag: str = "$function$") -> str:
    """The body between dollar quotes whose tag does not occur in it, so that it stays readable and byte-exact."""
    number = 0
    while tag[:-1] in body:
        number += 1
        tag = f"$function{number}$"
    return f"{tag}{body}{tag}"


def with_body(text: str, body: str) -> str:
    """The one CREATE statement of `text` with another body after AS, everything else as it is written."""
    statement, troubles = single(text)
    if statement is None:
        raise ValueError(troubles[0].message)
    options = {node.def_elem.defname: node.def_elem for node in statement.node.create_function_stmt.options}
    start, end = body_of(text, options["as"]).token
    written = text.encode()
    tag = re.match(rb"\$[^$]+\$", written[start:end])
    quoted = dollar_quoted(body, tag[0].decode() if tag is not None else "$function$")
    return (written[:start] + quoted.encode() + written[end:]).decode()


def with_statement(text: str, statement: str) -> str:
    """The file with another statement in the place of its one, and the comments before and after it."""
    tokens = [token for token in tokens_of(text)[0] if token.token not in COMMENTS]
    if not tokens:
        raise ValueError("its file holds no statement")
    written = text.encode()
    return (written[: tokens[0].start] + statement.encode() + written[tokens[-1].end :]).decode()


def _check_plpgsql(text: str, body: Body) -> tuple[list[Trouble], bool]:
    error = _plpgsql_error(text)
    if error is None:
        return [], True
    comma = error.message.endswith('at or near ","') and re.search(r"(?i)\bfor\s+[^;]*,", body.text) is not None
    if comma or NOT_THE_AUTHORS.search(error.message):
        return [], False
    if error.context is None:
        return [at(text, body.start, error.message)], True
    return [_in_file(text, body, Trouble(_error_line(text, body), None, error.message))], True


def _plpgsql_error(text: str) -> PgQueryError | None:
    try:
        parse_plpgsql(text)
    except PgQueryError as error:
        return error
    except (ValueError, RecursionError):
        # The body is right. postgast describes it in JSON, which is broken for trigger functions (`{}},` for the
        # variables that PostgreSQL fills in) and deep for deep blocks; the description is not needed here.
        return None
    return None


def _error_line(text: str, body: Body) -> int:
    """The line of the body at which PostgreSQL gives up.

    postgast says only near which statement. So a brace, which no statement can hold, is put before one word after the
    other: as long as the parser complains of the brace, it had come that far without a complaint.
    """
    raw, inner, quote = text.encode(), body.text.encode(), b"$reconciler$"
    before, after = raw[: body.token[0]] + quote, quote + raw[body.token[1] :]
    places = [token.start for token in tokens_of(body.text)[0]]

    def stopped_before(place: int) -> bool:
        error = _plpgsql_error((before + inner[:place] + b" } " + inner[place:] + after).decode())
        return error is None or "}" not in error.message

    last = bisect_left(places, True, key=stopped_before) - 1
    return inner.count(b"\n", 0, places[last]) + 1 if last >= 0 else 1


def _in_file(text: str, body: Body, trouble: Trouble) -> Trouble:
    """The same trouble with its line counted in `text` instead of in the body."""
    start = at(text, body.start, "")
    if trouble.line is None or start.line is None or start.column is None:
        return start._replace(column=None, message=trouble.message)
    column = trouble.column
    if column is not None and trouble.line == 1:
        column += start.column - 1
    return Trouble(start.line + trouble.line - 1, column, trouble.message)
