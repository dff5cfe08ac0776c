-- The auditor: history and verify. It may read the ledger, nothing else; evidence folders need no database at all.
GRANT USAGE ON SCHEMA reconciler TO auditor;
GRANT SELECT ON reconciler.entry TO auditor;
