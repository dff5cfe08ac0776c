-- The system's four extensions, all in schema public as they were found there; plpgsql is always
-- installed, in pg_catalog. A server that was built without pgcrypto goes without: the system itself
-- takes gen_random_uuid() from pg_catalog.
CREATE EXTENSION IF NOT EXISTS btree_gist WITH SCHEMA public;
CREATE EXTENSION IF NOT EXISTS postgres_fdw WITH SCHEMA public;

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_available_extensions WHERE name = 'pgcrypto') THEN
        CREATE EXTENSION IF NOT EXISTS pgcrypto WITH SCHEMA public;
    END IF;
END;
$$;
