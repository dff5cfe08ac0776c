"""Declared queries: may a stranger's SELECT be sent to the server? Everything that is not allowed here is refused.

`desired` asks before a file is accepted. `plan` runs for pull requests of people nobody knows, and READ ONLY alone does
not stop a query that sends signals, takes advisory locks, writes settings or runs text as SQL. So a query is one SELECT
whose parse tree holds only known nodes, known fields of them, relations with their schema, and functions, operators and
types of the lists below. The answer holds for a server where search_path is empty, standard_conforming_strings is on
and client_encoding is UTF8; any other setting can give the same text another meaning.

What stays possible is to be slow or large (cross joins, regular expressions, aggregates over them): time-outs and the
limits on rows and bytes are for that.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from postgast import pg_query_pb2 as pb
from postgast import unwrap_node, walk

from reconciler.syntax import (
    BUILTIN_TYPES,
    Trouble,
    at,
    expression_of,
    location_of,
    quote_ident,
    shifted,
    single,
    statement_end,
    strings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

CATALOG = frozenset(
    """
    acldefault aclexplode col_description current_database current_schema current_schemas format_type
    has_any_column_privilege has_column_privilege has_database_privilege has_foreign_data_wrapper_privilege
    has_function_privilege has_language_privilege has_parameter_privilege has_schema_privilege has_sequence_privilege
    has_server_privilege has_table_privilege has_tablespace_privilege has_type_privilege makeaclitem obj_description
    oidvectortypes pg_basetype pg_collation_for pg_column_compression pg_column_size pg_describe_object
    pg_encoding_to_char pg_function_is_visible pg_get_constraintdef pg_get_expr pg_get_function_arg_default
    pg_get_function_arguments pg_get_function_identity_arguments pg_get_function_result pg_get_function_sqlbody
    pg_get_functiondef pg_get_indexdef pg_get_partition_constraintdef pg_get_partkeydef pg_get_ruledef
    pg_get_serial_sequence pg_get_statisticsobjdef pg_get_triggerdef pg_get_userbyid pg_get_viewdef pg_has_role
    pg_identify_object pg_identify_object_as_address pg_partition_root pg_size_bytes pg_size_pretty
    pg_table_is_visible pg_type_is_visible pg_typeof pg_wal_lsn_diff row_security_active
    shobj_description to_regclass to_regcollation to_regnamespace to_regoper to_regoperator to_regproc to_regprocedure
    to_regrole to_regtype version
    """.split()
)
"""Functions that say what the catalog says: names, definitions, comments, privileges. FROM shows not what they read.

No pg_input_is_valid: it runs the code of types.
"""

FUNCTIONS = frozenset(
    # Numbers. No factorial: its cost grows faster than its argument.
    """
    abs acos acosd asin asind atan atan2 atan2d atand cbrt ceil ceiling cos cosd cosh cot cotd degrees div exp floor gcd
    lcm ln log log10 min_scale mod pi pow power radians round scale sign sin sind sinh sqrt tan tand tanh to_bin to_hex
    to_number to_oct trim_scale trunc width_bucket
    """.split()
    # Text. No repeat, lpad, rpad and format: one short call makes a gigabyte. Regular expressions can be interrupted.
    + """
    ascii bit_length btrim casefold char_length character_length chr concat concat_ws initcap is_normalized left length
    like_escape lower ltrim md5 normalize octet_length overlay parse_ident position quote_ident quote_literal
    quote_nullable regexp_count regexp_instr regexp_like regexp_match regexp_matches regexp_replace
    regexp_split_to_array regexp_split_to_table regexp_substr replace reverse right rtrim similar_escape
    similar_to_escape split_part starts_with string_to_array string_to_table strpos substr substring text to_ascii
    to_char translate unistr upper
    """.split()
    # Bytes, bits, digests and UUIDs.
    + """
    bit_count convert convert_from convert_to crc32 crc32c decode encode get_bit get_byte set_bit set_byte sha224 sha256
    sha384 sha512 uuid_extract_timestamp uuid_extract_version
    """.split()
    # Date and time, as of the start of the transaction or statement. clock_timestamp() is volatile.
    + """
    age date date_add date_bin date_part date_subtract date_trunc extract isfinite justify_days justify_hours
    justify_interval make_date make_interval make_time make_timestamp make_timestamptz now overlaps statement_timestamp
    timezone to_date to_timestamp transaction_timestamp
    """.split()
    # Casts that are written as calls.
    + "float8 int4 int8".split()
    # Arrays, ranges and sets. No array_fill: see repeat.
    + """
    array_append array_cat array_dims array_length array_lower array_ndims array_position array_positions array_prepend
    array_remove array_replace array_reverse array_sort array_to_string array_upper cardinality datemultirange daterange
    generate_series generate_subscripts int4multirange int4range int8multirange int8range isempty lower_inc lower_inf
    multirange num_nonnulls num_nulls nummultirange numrange range_merge trim_array tsmultirange tsrange tstzmultirange
    tstzrange unnest upper_inc upper_inf
    """.split()
    # JSON.
    + """
    array_to_json json_array_elements json_array_elements_text json_array_length json_build_array json_build_object
    json_each json_each_text json_extract_path json_extract_path_text json_object json_object_keys json_strip_nulls
    json_to_record json_to_recordset json_typeof jsonb_array_elements jsonb_array_elements_text jsonb_array_length
    jsonb_build_array jsonb_build_object jsonb_contains jsonb_each jsonb_each_text jsonb_exists jsonb_exists_all
    jsonb_exists_any jsonb_extract_path jsonb_extract_path_text jsonb_insert jsonb_object jsonb_object_keys
    jsonb_path_exists jsonb_path_match jsonb_path_query jsonb_path_query_array jsonb_path_query_first jsonb_pretty
    jsonb_set jsonb_set_lax jsonb_strip_nulls jsonb_to_record jsonb_to_recordset jsonb_typeof row_to_json to_json
    to_jsonb
    """.split()
    # Network addresses.
    + "abbrev broadcast family host hostmask inet_merge inet_same_family masklen netmask network set_masklen".split()
    + sorted(CATALOG)
)
"""Functions of pg_catalog, every overload of them IMMUTABLE or STABLE.

None of them takes SQL or the name of a type as text to run it, reads a file or a setting, takes a lock that a SELECT
would not take, assigns a transaction id, or has an effect. Settings are left out because those of an application can
hold passwords; the installed policy can allow `pg_catalog.current_setting`.
"""

AGGREGATES = frozenset(
    """
    any_value array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count covar_pop covar_samp every json_agg
    json_object_agg jsonb_agg jsonb_object_agg max min mode percentile_cont percentile_disc range_agg
    range_intersect_agg regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy
    stddev stddev_pop stddev_samp string_agg sum var_pop var_samp variance
    """.split()
)
WINDOWS = frozenset(
    "cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number".split()
)
SETS = frozenset(
    """
    aclexplode generate_series generate_subscripts json_array_elements json_array_elements_text json_each json_each_text
    json_object_keys json_to_recordset jsonb_array_elements jsonb_array_elements_text jsonb_each
    jsonb_each_text jsonb_object_keys jsonb_path_query jsonb_to_recordset regexp_matches
    regexp_split_to_table string_to_table unnest
    """.split()
)
"""Those of FUNCTIONS that return rows: not for an expression over one row."""

OUTPUT_COLUMNS = frozenset(
    "grantee grantor is_grantable key ordinality privilege_type value object_names object_args identity".split()
)
"""Columns of the rows that functions of FUNCTIONS return."""

OPERATORS = frozenset(
    """
    !! !~ !~* !~~ !~~* # ## #- #> #>> % & && &< &<| &> * *< *<= *<> *= *> *>= + - -> ->> -|- / < <-> << <<= <<| <= <> <@
    <^ = > >= >> >>= >^ ? ?# ?& ?- ?-| ?| ?|| @ @-@ @> @? @@ @@@ ^ ^@ | |&> |/ |>> || ||/ ~ ~* ~<=~ ~<~ ~= ~>=~ ~>~ ~~
    ~~*
    """.split()
)
"""Every operator name of pg_catalog on 14 to 18; the functions behind them are all IMMUTABLE or STABLE."""

TYPES = BUILTIN_TYPES - frozenset(
    """
    any anyarray anycompatible anycompatiblearray anycompatiblemultirange anycompatiblenonarray anycompatiblerange
    anyelement anyenum anymultirange anynonarray anyrange cstring event_trigger fdw_handler gtsvector index_am_handler
    internal language_handler pg_brin_bloom_summary pg_brin_minmax_multi_summary pg_ddl_command pg_dependencies
    pg_mcv_list pg_ndistinct pg_node_tree record refcursor table_am_handler trigger tsm_handler unknown void xml
    """.split()
)
"""Types that a query may cast to. The reg* types look names up and say no more than pg_class says."""

SECRET_RELATIONS = frozenset(
    """
    _pg_foreign_data_wrappers _pg_foreign_servers _pg_user_mappings foreign_data_wrapper_options foreign_server_options
    pg_authid pg_file_settings pg_hba_file_rules pg_ident_file_mappings pg_largeobject pg_settings pg_shadow
    pg_stat_statements pg_statistic pg_statistic_ext_data pg_stats pg_stats_ext pg_stats_ext_exprs pg_user_mapping
    pg_user_mappings user_mapping_options
    """.split()
)
"""Password hashes, connection strings, configuration files, other people's statements, samples of other tables.

Output shows counts and digests, but a question that is answered by yes or no gives a secret away letter by letter.
Named without schema: a view of the same name elsewhere is refused too.
"""

SECRET_COLUMNS = {
    "pg_db_role_setting": frozenset({"setconfig"}),
    "pg_foreign_data_wrapper": frozenset({"fdwoptions"}),
    "pg_foreign_server": frozenset({"srvoptions"}),
    "pg_roles": frozenset({"rolconfig"}),
    "pg_stat_activity": frozenset({"query"}),
    "pg_stat_wal_receiver": frozenset({"conninfo"}),
    "pg_subscription": frozenset({"subconninfo"}),
    "pg_user": frozenset({"useconfig"}),
}
"""The same, where the rest of the relation is worth asking: its other columns may be used, by their names."""

OPEN_COLUMNS = frozenset(
    """
    application_name backend_start backend_type backend_xid backend_xmin client_addr client_hostname client_port datid
    datname fdwacl fdwhandler fdwname fdwowner fdwvalidator flushed_lsn last_msg_receipt_time last_msg_send_time
    latest_end_lsn latest_end_time leader_pid oid passwd pid query_id query_start receive_start_lsn receive_start_tli
    received_lsn received_tli rolbypassrls rolcanlogin rolconnlimit rolcreatedb rolcreaterole rolinherit rolname
    rolpassword rolreplication rolsuper rolvaliduntil sender_host sender_port setdatabase setrole slot_name srvacl
    srvfdw srvname srvowner srvtype srvversion state state_change status subbinary subdbid subdisableonerr subenabled
    subfailover subname subowner suborigin subpasswordrequired subpublications subrunasowner subskiplsn subslotname
    substream subsynccommit subtwophasestate usebypassrls usecreatedb usename userepl usesuper usesysid valuntil
    wait_event wait_event_type written_lsn xact_start
    """.split()
)
"""Those other columns. After a dot any other name could be a function that takes the whole row: a.to_jsonb."""

NODES: dict[str, str] = {
    "A_ArrayExpr": "elements list_start list_end",
    "A_Const": "ival fval boolval sval bsval isnull",
    "A_Expr": "kind name lexpr rexpr rexpr_list_start rexpr_list_end",
    "A_Indices": "is_slice lidx uidx",
    "A_Indirection": "arg indirection",
    "A_Star": "",
    "Alias": "aliasname colnames",
    "BitString": "bsval",
    "BoolExpr": "boolop args",
    "Boolean": "boolval",
    "BooleanTest": "arg booltesttype",
    "CaseExpr": "arg args defresult",
    "CaseWhen": "expr result",
    "CoalesceExpr": "args",
    "CollateClause": "arg collname",
    "ColumnDef": "colname type_name is_local",
    "ColumnRef": "fields",
    "CommonTableExpr": "ctename aliascolnames ctematerialized ctequery",
    "Float": "fval",
    "FuncCall": (
        "funcname args agg_order agg_filter over agg_within_group agg_star agg_distinct func_variadic funcformat"
    ),
    "GroupingFunc": "args",
    "GroupingSet": "kind content",
    "Integer": "ival",
    "JoinExpr": "jointype is_natural larg rarg using_clause join_using_alias quals alias rtindex",
    "JsonAggConstructor": "output agg_filter agg_order over",
    "JsonArrayAgg": "constructor arg absent_on_null",
    "JsonArrayConstructor": "exprs output absent_on_null",
    "JsonFormat": "format_type encoding",
    "JsonIsPredicate": "expr format item_type unique_keys",
    "JsonKeyValue": "key value",
    "JsonObjectAgg": "constructor arg absent_on_null unique",
    "JsonObjectConstructor": "exprs output absent_on_null unique",
    "JsonOutput": "type_name returning",
    "JsonReturning": "format",
    "JsonValueExpr": "raw_expr format",
    "List": "items",
    "MinMaxExpr": "op args",
    "NamedArgExpr": "arg name argnumber",
    "Node": "",
    "NullTest": "arg nulltesttype",
    "RangeFunction": "lateral ordinality is_rowsfrom functions alias coldeflist",
    "RangeSubselect": "lateral subquery alias",
    "RangeVar": "schemaname relname inh relpersistence alias",
    "ResTarget": "name val",
    "RowExpr": "args row_format",
    "SQLValueFunction": "op typmod",
    "SelectStmt": (
        "distinct_clause target_list from_clause where_clause group_clause group_distinct having_clause window_clause "
        "values_lists sort_clause limit_offset limit_count limit_option with_clause op all larg rarg"
    ),
    "SortBy": "node sortby_dir sortby_nulls",
    "String": "sval",
    "SubLink": "sub_link_type testexpr oper_name subselect",
    "TypeCast": "arg type_name",
    "TypeName": "names typmods typemod array_bounds",
    "WindowDef": "name refname partition_clause order_clause frame_options start_offset end_offset",
    "WithClause": "ctes",
}
"""The nodes of a parse tree that may be there, each with its fields (`location` always). Others are refused."""

NAMES = {
    "JsonFuncExpr": "JSON_VALUE, JSON_QUERY or JSON_EXISTS",
    "JsonTable": "JSON_TABLE",
    "A_Star": "*",
    "ParamRef": "a parameter such as $1",
    "RangeTableFunc": "XMLTABLE",
    "RangeTableSample": "TABLESAMPLE",
    "SubLink": "a subquery",
    "XmlExpr": "XML",
    "XmlSerialize": "XML",
    "SelectStmt.into_clause": "INTO",
    "SelectStmt.locking_clause": "a locking clause such as FOR UPDATE",
    "SortBy.use_op": "ORDER BY ... USING",
    "TypeName.pct_type": "%TYPE",
    "TypeName.setof": "SETOF",
    "WithClause.recursive": "WITH RECURSIVE",
}
"""What people call the nodes and fields that are refused."""


class QueryReport(NamedTuple):
    """What `check_query` found: everything wrong, and the relations that are read, `schema.relation`, sorted.

    functions: names of the functions that are called, as they are written.
    """

    troubles: list[Trouble]
    relations: tuple[str, ...]
    functions: frozenset[str] = frozenset()


def check_query(text: str, allow_functions: Sequence[str] = ()) -> QueryReport:
    """Whether `text` is one SELECT that a stranger may have written. Each trouble stands at its place.

    `allow_functions`: names `schema.function` of the installed policy, allowed besides FUNCTIONS.
    """
    report = _report(text, frozenset(allow_functions))
    return report._replace(troubles=list(report.troubles))


@lru_cache(maxsize=512)  # an apply asks for the same queries at each of its looks
def _report(text: str, allow_functions: frozenset[str]) -> QueryReport:
    statement, troubles = single(text)
    if statement is None:
        return QueryReport(troubles, ())
    checker = _Checker(text, allow_functions, _facts(statement.node))
    checker.place = statement.start
    checker.only_select(statement.node, statement.start, frozenset())
    checker.check_end()
    if statement.node.select_stmt.values_lists:
        checker.refuse(statement.start, "VALUES alone is not allowed here; write a SELECT")
    return QueryReport(checker.sorted_troubles(), tuple(sorted(checker.relations)), frozenset(checker.functions))


def counted(text: str) -> str | None:
    """The relation, `schema.relation`, when the query is SELECT count(*) of all its rows and nothing else."""
    statement, _ = single(text)
    if statement is None or not statement.node.HasField("select_stmt"):
        return None
    select = pb.SelectStmt()
    select.CopyFrom(statement.node.select_stmt)
    if len(select.target_list) != 1 or len(select.from_clause) != 1 or select.op != pb.SETOP_NONE:
        return None
    call, table = select.target_list[0].res_target.val.func_call, select.from_clause[0].range_var
    if not (call.agg_star and strings(call.funcname)[-1] == "count" and table.schemaname and table.inh):
        return None
    name = f"{quote_ident(table.schemaname)}.{quote_ident(table.relname)}"
    for field in ("funcname", "agg_star", "funcformat", "location"):
        call.ClearField(field)
    for field in ("target_list", "from_clause", "limit_option", "op"):
        select.ClearField(field)
    return name if select == pb.SelectStmt() and call == pb.FuncCall() else None


def check_expression(text: str, allow_functions: Sequence[str] = ()) -> list[Trouble]:
    """Whether `text` is one expression over the columns of one row: no subquery, no aggregate, no set."""
    node, troubles = expression_of(text)
    if node is None:
        return troubles
    prefix = "SELECT "
    checker = _Checker(prefix + text, allow_functions, _facts(node), one_row=True)
    checker.visit(node, frozenset())
    checker.check_end()
    return [shifted(trouble, len(prefix)) for trouble in checker.sorted_troubles()]


class _Facts(NamedTuple):
    """What must be known of a whole tree before its parts can be judged."""

    functions: Mapping[str, frozenset[str]]
    """The names that functions in FROM go by, each with the columns that they surely have."""
    rows: frozenset[str]
    """The names of everything else in FROM: a row of these is a row, which few functions take."""
    secrets: frozenset[str]
    """The names that relations with secret columns go by."""
    hidden: frozenset[str]
    """Those columns."""


def _facts(tree: Message) -> _Facts:
    functions: dict[str, frozenset[str]] = {}
    rows: set[str] = set()
    secrets: set[str] = set()
    hidden: set[str] = set()
    for _, node in walk(tree):
        if isinstance(node, pb.RangeFunction):
            for name, columns in _function_names(node):
                functions[name] = functions.get(name, columns) & columns
        elif isinstance(node, pb.RangeVar):
            rows.add(node.alias.aliasname or node.relname)
            if node.relname in SECRET_COLUMNS:
                secrets.add(node.alias.aliasname or node.relname)
                hidden |= SECRET_COLUMNS[node.relname]
        elif isinstance(node, pb.RangeSubselect):
            rows.add(node.alias.aliasname)
        elif isinstance(node, pb.JoinExpr):
            rows |= {node.alias.aliasname, node.join_using_alias.aliasname}
    return _Facts(functions, frozenset(rows), frozenset(secrets), frozenset(hidden))


def _function_names(node: pb.RangeFunction) -> Iterator[tuple[str, frozenset[str]]]:
    """The alias, or without one the names of the functions themselves; a scalar column is named like them."""
    declared = {column.string.sval for column in node.alias.colnames}
    declared |= {column.column_def.colname for column in node.coldeflist}
    calls = (inner for _, inner in walk(node) if isinstance(inner, pb.FuncCall)) if not node.alias.aliasname else ()
    for name in (node.alias.aliasname, *(strings(call.funcname)[-1] for call in calls)):
        if name:
            yield name, frozenset(declared | {name})


class _Checker:
    """Walks one tree, collects troubles and relations. `scope`: the names of the CTEs that can be seen from a node."""

    def __init__(self, text: str, allow_functions: Collection[str], facts: _Facts, *, one_row: bool = False) -> None:
        self.text = text
        self.policy = frozenset(allow_functions)
        self.facts = facts
        self.one_row = one_row
        self.troubles: list[Trouble] = []
        self.relations: set[str] = set()
        self.functions: set[str] = set()
        self.place = 0

    def refuse(self, location: int, message: str) -> None:
        """Notes a trouble; where the tree gives no place, it is that of the last node that has one."""
        self.troubles.append(at(self.text, location if location >= 0 else self.place, message))

    def sorted_troubles(self) -> list[Trouble]:
        """All troubles in order of place, each once."""
        return sorted(set(self.troubles), key=lambda trouble: (trouble.line or 0, trouble.column or 0, trouble.message))

    def check_end(self) -> None:
        """Something may be put behind the text."""
        ending = statement_end(self.text)
        if ending is not None:
            self.troubles.append(ending)

    def only_select(self, node: pb.Node, start: int, scope: frozenset[str]) -> None:
        """The whole statement, or that of a CTE."""
        if node.HasField("select_stmt"):
            self.visit(node, scope)
        else:
            self.refuse(start, "only SELECT is allowed here")

    def visit(self, wrapped: Message, scope: frozenset[str]) -> None:
        """Refuses what is not in NODES, judges what names something, and goes on to the children."""
        node = unwrap_node(wrapped)
        location = getattr(node, "location", -1)
        if location >= 0:
            self.place = location
        if not self.known(node, location):
            return
        if isinstance(node, pb.SelectStmt):
            scope = self.with_clause(node, scope)
        elif isinstance(node, pb.RangeVar):
            self.relation(node, scope)
        elif type(node) in JUDGES:
            JUDGES[type(node)](self, node)
        for child in _children(node):
            if not isinstance(child, pb.WithClause):
                self.visit(child, scope)

    def known(self, node: Message, location: int) -> bool:
        """Whether the kind of `node` is in NODES; its fields are judged one by one."""
        kind = node.DESCRIPTOR.name
        if kind not in NODES or (self.one_row and kind in {"SelectStmt", "SubLink", "A_Star"}):
            self.refuse(location_of(node), f"{NAMES.get(kind, kind)} is not allowed here")
            return False
        for field, value in _fields(node, allowed=False):
            name = NAMES.get(f"{kind}.{field.name}", f"{field.name} of {kind}")
            parts = value if field.is_repeated else (value,)
            inner = max((location_of(part) for part in parts if isinstance(part, Message)), default=-1)
            self.refuse(inner if inner >= 0 else location, f"{name} is not allowed here")
        return True

    def with_clause(self, node: pb.SelectStmt, scope: frozenset[str]) -> frozenset[str]:
        """A CTE is seen by those after it and by the query it belongs to. Elsewhere its name means a relation."""
        if not node.HasField("with_clause") or not self.known(node.with_clause, node.with_clause.location):
            return scope
        for item in node.with_clause.ctes:
            cte = item.common_table_expr
            if self.known(cte, cte.location):
                self.only_select(cte.ctequery, cte.location, scope)
            scope |= {cte.ctename}
        return scope

    def relation(self, node: pb.RangeVar, scope: frozenset[str]) -> None:
        """With its schema, because search_path is empty and pg_catalog is always searched."""
        if not node.schemaname:
            if node.relname not in scope:
                name = quote_ident(node.relname)
                self.refuse(node.location, f"relation {name} must be named with its schema: schema.{name}")
            return
        name = f"{quote_ident(node.schemaname)}.{quote_ident(node.relname)}"
        self.relations.add(name)
        if node.schemaname.startswith("pg_") and node.schemaname != "pg_catalog":
            self.refuse(node.location, f"schema {node.schemaname} is not allowed here")
        if node.schemaname == "information_schema":
            self.refuse(node.location, "information_schema shows each role something else; use pg_catalog")
        if node.relname in SECRET_RELATIONS:
            self.refuse(node.location, f"relation {name} is not allowed here: it can hold secrets")
        if node.relname in SECRET_COLUMNS and node.alias.colnames:
            self.refuse(node.location, f"the columns of {name} may not be renamed here")

    def function(self, node: pb.FuncCall) -> None:
        """A function of the lists, or one that the policy names with its schema."""
        names = strings(node.funcname)
        name = names[-1]
        self.functions.add(name)
        if len(names) == 1 or names[:-1] == ("pg_catalog",):
            known = name in (FUNCTIONS - SETS if self.one_row else FUNCTIONS | AGGREGATES | WINDOWS)
            known = known or f"pg_catalog.{name}" in self.policy
        else:
            known = ".".join(names) in self.policy or ".".join(map(quote_ident, names)) in self.policy
        if not known:
            written = ".".join(map(quote_ident, names))
            why = "of one row" if self.one_row and name in AGGREGATES | WINDOWS | SETS else "that is allowed here"
            self.refuse(node.location, f"{written} is no function {why}")
        if self.one_row and (node.agg_star or node.agg_distinct or node.HasField("over")):
            self.refuse(node.location, "an aggregate or window function is not allowed here")

    def from_function(self, node: pb.RangeFunction) -> None:
        """Only plain calls: FROM CAST(1 AS int4) goes by the name int4, FROM COALESCE(1) by the name coalesce."""
        for item in node.functions:
            if not item.list.items or not item.list.items[0].HasField("func_call"):
                self.refuse(location_of(item), "only the call of a function is allowed in FROM")

    def operator(self, node: pb.A_Expr | pb.SubLink) -> None:
        """An operator of pg_catalog, with or without OPERATOR(pg_catalog. )."""
        if isinstance(node, pb.A_Expr) and node.kind in BETWEEN:
            return
        names = strings(node.name if isinstance(node, pb.A_Expr) else node.oper_name)
        if names and (names[-1] not in OPERATORS or names[:-1] not in ((), ("pg_catalog",))):
            self.refuse(node.location, f"operator {'.'.join(names)} is not allowed here")

    def type(self, node: pb.TypeName) -> None:
        """A built-in type: another one's input function is somebody's code."""
        names = strings(node.names)
        plain = names[-1].removeprefix("_") if names else ""
        if names[:-1] not in ((), ("pg_catalog",)) or plain not in TYPES:
            self.refuse(node.location, f"type {'.'.join(map(quote_ident, names))} is not allowed here")

    def collation(self, node: pb.CollateClause) -> None:
        """A collation of pg_catalog."""
        names = strings(node.collname)
        if names[:-1] not in ((), ("pg_catalog",)):
            self.refuse(node.location, f"collation {'.'.join(map(quote_ident, names))} is not allowed here")

    def column(self, node: pb.ColumnRef) -> None:
        """A column, unless PostgreSQL would find none and call a function of that name: x.pg_sleep is pg_sleep(x)."""
        names = strings(node.fields)
        star = node.fields[-1].HasField("a_star")
        if self.one_row:
            if len(names) > 1:
                self.refuse(node.location, "write the name of the column alone")
            return
        facts = self.facts
        if star or len(names) == 1:
            whole = star or names[0] in facts.secrets
            if facts.secrets and whole:
                self.refuse(node.location, f"name the columns one by one: {', '.join(sorted(facts.hidden))} is secret")
        else:
            self.dotted(names[-2], names[-1], node.location)
        if names[-1] in facts.hidden:
            self.refuse(node.location, f"column {names[-1]} can hold secrets")

    def dotted(self, relation: str, name: str, location: int) -> None:
        """`relation.name`: PostgreSQL looks for a column first, then for a function that takes the relation's row."""
        facts = self.facts
        harmless = name in FUNCTIONS | AGGREGATES | WINDOWS
        if relation in facts.secrets:
            sure = name in OPEN_COLUMNS
        elif relation in facts.functions:
            sure = name in facts.functions[relation] | OUTPUT_COLUMNS or harmless
        else:
            sure = relation in facts.rows and (harmless or not name.startswith("pg_"))
        column = f"{quote_ident(relation)}.{quote_ident(name)}"
        if not sure and relation in facts.functions:
            hint = f"declare the column: AS {quote_ident(relation)}({quote_ident(name)})"
            self.refuse(location, f"{column} could be a call of a function; {hint}")
        elif not sure:
            self.refuse(location, f"{column} could be a call of a function; write the column name alone")

    def indirection(self, node: pb.A_Indirection) -> None:
        """Subscripts only: (1).pg_sleep is pg_sleep(1)."""
        if not all(step.HasField("a_indices") for step in node.indirection):
            location = location_of(node.arg)
            self.refuse(location, "a field of an expression could be a call of a function; put the expression in FROM")

    def join(self, node: pb.JoinExpr) -> None:
        """A join can name columns without saying so."""
        if self.facts.secrets and (node.is_natural or node.HasField("alias")):
            self.refuse(self.place, "a NATURAL JOIN or a join with a name is not allowed beside secret columns")
        for column in strings(node.using_clause):
            if column in self.facts.hidden:
                self.refuse(self.place, f"column {column} can hold secrets")


JUDGES: Mapping[type[Message], Callable[[_Checker, Any], None]] = {
    pb.FuncCall: _Checker.function,
    pb.RangeFunction: _Checker.from_function,
    pb.A_Expr: _Checker.operator,
    pb.SubLink: _Checker.operator,
    pb.TypeName: _Checker.type,
    pb.CollateClause: _Checker.collation,
    pb.ColumnRef: _Checker.column,
    pb.A_Indirection: _Checker.indirection,
    pb.JoinExpr: _Checker.join,
}
"""Who looks at the nodes that name something. RangeVar and SelectStmt need to know their scope."""

BETWEEN = (pb.AEXPR_BETWEEN, pb.AEXPR_NOT_BETWEEN, pb.AEXPR_BETWEEN_SYM, pb.AEXPR_NOT_BETWEEN_SYM)
"""Kinds of A_Expr whose name is no operator but a word."""


def _fields(node: Message, *, allowed: bool) -> Iterator[tuple[FieldDescriptor, Any]]:
    """The fields of a known node that are set and are, or are not, in NODES."""
    known = (*NODES[node.DESCRIPTOR.name].split(), "location")
    return ((field, value) for field, value in node.ListFields() if (field.name in known) is allowed)


def _children(node: Message) -> Iterator[Message]:
    """The messages in the allowed fields of `node`."""
    for field, value in _fields(node, allowed=True):
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            yield from value if field.is_repeated else (value,)
