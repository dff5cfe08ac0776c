"""What the apply role lacks is asked about the table that is meant, however its name is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from reconciler import capabilities, pg
from reconciler.errors import MissingPrivilege
from tests import states

if TYPE_CHECKING:
    from tests.servers import Database


@pytest.mark.parametrize(
    "table", ["app.settings", '"odd.schema"."set.tings"', 'app."Set""tings"', '"odd.schema".plain', 'app."a.b"']
)
def test_a_privilege_on_a_table_with_any_name_is_missed_before_anything_is_locked(db: Database, table: str) -> None:
    db.execute('CREATE SCHEMA app; CREATE SCHEMA "odd.schema"')
    db.execute(f"CREATE TABLE {table} (name text PRIMARY KEY, value text)")
    role = db.role()
    db.execute(f"GRANT CREATE ON DATABASE {db.name} TO {role}")
    db.execute(f'GRANT USAGE ON SCHEMA app, "odd.schema" TO {role}')
    db.execute(f'GRANT SELECT ON ALL TABLES IN SCHEMA app, "odd.schema" TO {role}')
    wanted = states.desired(states.gate("app.a", "true"))
    made = states.build(wanted)
    changes = tuple(
        change.model_copy(update={"after": {**(change.after or {}), "table": table}}) for change in made.changes
    )
    assert len(changes) == 1
    target = states.TARGET.model_copy(update={"database": db.name})
    plan = made.model_copy(update={"changes": changes, "target": target})
    with pg.connect(db.dsn_as(role), "apply") as conn:
        with pytest.raises(MissingPrivilege) as refused:
            capabilities.check(conn, wanted, plan, ledger_exists=False)
        assert refused.value.message == f"Role {role} lacks INSERT on {table}."
        db.execute(f"GRANT INSERT ON {table} TO {role}")
        capabilities.check(conn, wanted, plan, ledger_exists=False)
