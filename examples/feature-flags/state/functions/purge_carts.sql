CREATE PROCEDURE "Shop Control".purge_carts(IN p_batch integer, OUT p_purged bigint)
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, "Shop Control", pg_temp
AS $procedure$
DECLARE
    v_days integer;
BEGIN
    p_purged := 0;
    -- Only the word on opens it; absent and anything else is shut.
    IF NOT EXISTS (
        SELECT FROM "Shop Control".app_settings AS s WHERE s.name = 'carts.purge' AND s.val = '"on"'
    ) THEN
        RAISE NOTICE 'carts.purge is not on; nothing was deleted';
        RETURN;
    END IF;
    SELECT (s.val #>> '{}')::integer
    INTO v_days
    FROM "Shop Control".app_settings AS s
    WHERE s.name = 'carts.max_age_days' AND s.val @@ '$ > 0 && $ < 100000';
    IF v_days IS NULL THEN
        RAISE EXCEPTION 'carts.max_age_days is no positive number of days';
    END IF;
    DELETE FROM "Shop Control".cart AS c
    WHERE c.cart_id IN (
        SELECT old.cart_id
        FROM "Shop Control".cart AS old
        WHERE old.touched_at < clock_timestamp() - make_interval(days => v_days)
        ORDER BY old.touched_at
        LIMIT greatest(coalesce(p_batch, 0), 0)
        FOR UPDATE SKIP LOCKED
    );
    GET DIAGNOSTICS p_purged = ROW_COUNT;
END;
$procedure$;
