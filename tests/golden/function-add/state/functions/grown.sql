CREATE FUNCTION public.fn_grown(
    IN p_names text[] DEFAULT '{}',
    VARIADIC p_rest integer[] DEFAULT ARRAY[1, 2]
)
RETURNS SETOF integer
LANGUAGE plpgsql
STABLE
STRICT
SECURITY DEFINER
PARALLEL RESTRICTED
COST 5
ROWS 12.5
SET search_path = pg_catalog, public, pg_temp
SET work_mem = '8MB'
AS $function$
BEGIN
    -- a quote ' and a dollar $1
    RETURN QUERY SELECT r FROM unnest(p_rest) AS r WHERE array_length(p_names, 1) > 0;
END
$function$;
