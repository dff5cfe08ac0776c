-- The operator: apply. It is called reconciler_operator because the system has an operator already, who calls functions:
-- proofs show that this one can write no table, so it cannot be the one that applies. What it may beyond reading is what the statements of a plan need, and what the proofs need that
-- are played just before COMMIT. `reconciler plan -v` lists it for each plan, with what it is for.
\set reader reconciler_operator
\ir reads.sql

-- Gates: new rows, and the two columns that a change writes. Proofs take a gate away to see what its absence does.
GRANT INSERT, DELETE ON public.dot_config TO reconciler_operator;
GRANT UPDATE (value, updated_at) ON public.dot_config TO reconciler_operator;

-- Functions are created and changed by their owner: SET ROLE is enough. From PostgreSQL 16 on the operator has, as
-- itself, nothing of what the owner may; before, whoever is a member inherits.
SELECT current_setting('server_version_num')::integer >= 160000 AS set_without_inherit,
       current_setting('server_version_num')::integer >= 150000 AS parameters_are_granted
\gset
\if :set_without_inherit
    GRANT workflow_admin TO reconciler_operator WITH INHERIT FALSE, SET TRUE;
\else
    GRANT workflow_admin TO reconciler_operator;
\endif
GRANT USAGE, CREATE ON SCHEMA public TO workflow_admin;

-- The marker is inserted `via` fn_queue_heartbeat_register_passive, which functions.yaml opens to the role operator.
GRANT operator TO reconciler_operator;

-- Proofs act as those who call the functions (operator is one of them),
\if :set_without_inherit
    GRANT worker, reader TO reconciler_operator WITH INHERIT FALSE, SET TRUE;
\else
    GRANT worker, reader TO reconciler_operator;
\endif
-- are given rows of their own, all rolled back,
GRANT INSERT, UPDATE ON public.job_queue, public.job_dead_letter, public.queue_heartbeat TO reconciler_operator;
-- and have calls of dblink counted, which no rollback reaches: only where dblink or its like is installed.
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_extension WHERE extname IN ('adminpack', 'dblink', 'http', 'pg_background')
) AS calls_must_be_counted
\gset
\if :calls_must_be_counted
    \if :parameters_are_granted
        GRANT SET ON PARAMETER track_functions TO reconciler_operator;
    \else
        ALTER ROLE reconciler_operator SET track_functions = 'all';
    \endif
\endif

-- The ledger: one more entry. The table refuses to change or lose one.
GRANT INSERT ON reconciler.entry TO reconciler_operator;

-- Only for `backup: full`, which is pg_dump: it reads every table. psql -v full_backup=yes
\if :{?full_backup}
    GRANT pg_read_all_data TO reconciler_operator;
\endif
