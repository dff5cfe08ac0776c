GRANT USAGE, CREATE ON SCHEMA public TO golden_owner;
CREATE FUNCTION public.fn_one(p_limit integer) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    RETURN p_limit + 1;
END
$$;
REVOKE ALL ON FUNCTION public.fn_one(integer) FROM PUBLIC;
ALTER FUNCTION public.fn_one(integer) OWNER TO golden_owner;
GRANT EXECUTE ON FUNCTION public.fn_one(integer) TO golden_caller;
COMMENT ON FUNCTION public.fn_one(integer) IS 'Gives its argument back.';
