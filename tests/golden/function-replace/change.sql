CREATE OR REPLACE FUNCTION public.fn_one(p_limit integer DEFAULT 6) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    RETURN p_limit;
END
$$;
