-- Roles belong to the cluster, not to the database, and two databases may be loaded at the same time:
-- an existing role is left as it is, and losing the race for a new one is no error.
--   workflow_admin  owns everything of the system; SECURITY DEFINER functions run as it
--   operator        reaps, triages, registers
--   worker          enqueues, claims, acknowledges, beats
--   reader          looks
-- Nobody is a member of workflow_admin: no one gets at the tables except through the functions.
DO $$
DECLARE
    v_role text;
BEGIN
    FOREACH v_role IN ARRAY ARRAY['workflow_admin', 'operator', 'worker', 'reader'] LOOP
        BEGIN
            IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = v_role) THEN
                EXECUTE format(
                    'CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS INHERIT', v_role
                );
            END IF;
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN
                NULL;
        END;
    END LOOP;

    IF EXISTS (
        SELECT FROM pg_catalog.pg_roles
        WHERE rolname IN ('workflow_admin', 'operator', 'worker', 'reader') AND rolsuper
    ) THEN
        RAISE EXCEPTION 'one of the roles workflow_admin, operator, worker, reader is a superuser on this server'
            USING HINT = 'The permissions of this system would mean nothing. Load it into another server.';
    END IF;
END;
$$;

-- PostgreSQL 14 lets PUBLIC create in schema public, 15 and later do not. One behaviour on all of them.
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO workflow_admin;
GRANT USAGE ON SCHEMA public TO operator, worker, reader;
