-- The roles themselves, once on each server, by a superuser or somebody who may create roles. What exists is left as it
-- is. Nobody is given a password here: that is between the server's pg_hba.conf and \password.
--
--   planner             runs plan, drift and pin; may read, nothing else
--   reconciler_operator runs apply; becomes whom it must for as long as a statement takes
--   auditor             runs history and verify; may read the ledger, nothing else
--   reconciler_ledger   owns the ledger; nobody is it, nobody becomes it
--   workflow_admin      owns the governed functions; from now on nobody can log in as it

SELECT format('CREATE ROLE %I %s NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS', name, login)
FROM (VALUES ('planner', 'LOGIN'), ('reconciler_operator', 'LOGIN'), ('auditor', 'LOGIN'), ('reconciler_ledger', 'NOLOGIN'),
             ('workflow_admin', 'NOLOGIN')) AS wanted (name, login)
WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles AS r WHERE r.rolname = name)
\gexec

ALTER ROLE workflow_admin NOLOGIN;
