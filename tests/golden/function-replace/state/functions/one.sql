CREATE FUNCTION public.fn_one(p_limit integer DEFAULT 5) RETURNS integer
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE COST 10
SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    RETURN p_limit;
END
$$;
