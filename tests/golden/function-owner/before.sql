GRANT USAGE, CREATE ON SCHEMA public TO golden_owner;
GRANT USAGE, CREATE ON SCHEMA public TO golden_other;
CREATE FUNCTION public.fn_one(p_limit integer DEFAULT 5) RETURNS integer
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE COST 10
SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    RETURN p_limit;
END
$$;
REVOKE ALL ON FUNCTION public.fn_one(integer) FROM PUBLIC;
ALTER FUNCTION public.fn_one(integer) OWNER TO golden_owner;
GRANT EXECUTE ON FUNCTION public.fn_one(integer) TO golden_caller;
COMMENT ON FUNCTION public.fn_one(integer) IS 'Gives its argument back.';
ALTER FUNCTION public.fn_one(integer) OWNER TO golden_other;
