-- The ledger: what was applied to this database, by which approval, and what was there afterwards.
-- One append-only table. Each entry carries the hash of the one before it, and the database itself checks that an
-- entry's hash is that of its body, so a chain can be checked from the rows alone.
CREATE SCHEMA reconciler;
COMMENT ON SCHEMA reconciler IS 'Ledger of the reconciler: append-only record of what was applied here. Version 1.';

CREATE TABLE reconciler.entry (
    name         text        NOT NULL,  -- governance name; each has a chain of its own
    number       bigint      NOT NULL CHECK (number >= 1),
    run_id       uuid        NOT NULL UNIQUE,
    recorded_at  timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    approval_ids uuid[]      NOT NULL,
    body         text        NOT NULL,  -- canonical JSON (RFC 8785); text, because jsonb would reorder it
    previous     text        NOT NULL CHECK (previous ~ '^[0-9a-f]{64}$'),
    hash         text        NOT NULL UNIQUE,
    PRIMARY KEY (name, number),
    CONSTRAINT entry_hash_check CHECK (
        hash = pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(previous || body, 'UTF8')), 'hex'))
);

CREATE FUNCTION reconciler.entry_is_append_only() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    v_previous text;
    v_used     uuid;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        RAISE EXCEPTION 'reconciler.entry is append-only: % is refused', TG_OP USING ERRCODE = '42501';
    END IF;
    SELECT e.hash INTO v_previous FROM reconciler.entry e WHERE e.name = NEW.name AND e.number = NEW.number - 1;
    IF NEW.previous IS DISTINCT FROM coalesce(v_previous, CASE NEW.number WHEN 1 THEN repeat('0', 64) END) THEN
        RAISE EXCEPTION 'entry % of % does not follow the chain', NEW.number, NEW.name USING ERRCODE = '23514';
    END IF;
    SELECT a.id INTO v_used
      FROM pg_catalog.unnest(NEW.approval_ids) AS a (id)
      JOIN reconciler.entry e ON a.id = ANY (e.approval_ids)
     LIMIT 1;
    IF v_used IS NOT NULL THEN
        RAISE EXCEPTION 'approval % was used before', v_used USING ERRCODE = '23505';
    END IF;
    RETURN NEW;
END
$function$;

CREATE TRIGGER entry_is_append_only_row BEFORE INSERT OR UPDATE OR DELETE ON reconciler.entry
    FOR EACH ROW EXECUTE FUNCTION reconciler.entry_is_append_only();
CREATE TRIGGER entry_is_append_only_statement BEFORE TRUNCATE ON reconciler.entry
    FOR EACH STATEMENT EXECUTE FUNCTION reconciler.entry_is_append_only();

REVOKE ALL ON SCHEMA reconciler FROM PUBLIC;
REVOKE ALL ON reconciler.entry FROM PUBLIC;
REVOKE ALL ON FUNCTION reconciler.entry_is_append_only() FROM PUBLIC;
