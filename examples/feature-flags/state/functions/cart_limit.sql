CREATE FUNCTION "Shop Control"."cartLimit"()
RETURNS integer
LANGUAGE plpgsql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, "Shop Control", pg_temp
AS $function$
DECLARE
    v_items jsonb;
BEGIN
    SELECT s.val -> 'items'
    INTO v_items
    FROM "Shop Control".app_settings AS s
    WHERE s.name = 'checkout.limits';
    -- A limit that is missing or no positive number is the smallest one that still lets people buy.
    IF jsonb_typeof(v_items) IS DISTINCT FROM 'number' OR v_items::numeric < 1 THEN
        RETURN 20;
    END IF;
    RETURN least(v_items::numeric, 1000)::integer;
END;
$function$;
