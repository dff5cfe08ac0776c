CREATE FUNCTION "Shop Control".flag_is_on(p_name text)
RETURNS boolean
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, "Shop Control", pg_temp
AS $function$
    -- Only the JSON value true is on: not "true", not 1, not an object.
    SELECT coalesce(bool_or(s.val = 'true'), false)
    FROM "Shop Control".app_settings AS s
    WHERE s.name = p_name
$function$;
