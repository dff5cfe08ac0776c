GRANT USAGE, CREATE ON SCHEMA public TO golden_owner;
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
GRANT EXECUTE ON FUNCTION public.fn_one(integer) TO PUBLIC;
GRANT EXECUTE ON FUNCTION public.fn_one(integer) TO golden_other WITH GRANT OPTION;
SET ROLE golden_other;
GRANT EXECUTE ON FUNCTION public.fn_one(integer) TO golden_caller;
RESET ROLE;
REVOKE EXECUTE ON FUNCTION public.fn_one(integer) FROM golden_owner;
