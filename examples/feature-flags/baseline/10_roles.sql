-- Roles belong to the cluster: one that is there already is left as it is.
--   shop-admin   owns the schema; what is SECURITY DEFINER runs as it
--   storefront   the application
--   on-call      people
--   release bot  the pipeline that ships releases
DO $$
DECLARE
    v_role text;
BEGIN
    FOREACH v_role IN ARRAY ARRAY['shop-admin', 'storefront', 'on-call', 'release bot'] LOOP
        BEGIN
            IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = v_role) THEN
                EXECUTE format('CREATE ROLE %I LOGIN', v_role);
            END IF;
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN
                NULL;  -- another database of this server was loaded at the same moment
        END;
    END LOOP;
END;
$$;

CREATE SCHEMA "Shop Control" AUTHORIZATION "shop-admin";
GRANT USAGE ON SCHEMA "Shop Control" TO storefront, "on-call", "release bot";
