-- Version 2: the triggers fire in every session, also where session_replication_role is replica.
ALTER TABLE reconciler.entry ENABLE ALWAYS TRIGGER entry_is_append_only_row;
ALTER TABLE reconciler.entry ENABLE ALWAYS TRIGGER entry_is_append_only_statement;
COMMENT ON SCHEMA reconciler IS 'Ledger of the reconciler: append-only record of what was applied here. Version 2.';
