CREATE FUNCTION public.fn_b() RETURNS integer
LANGUAGE plpgsql AS $$
BEGIN
    RETURN 1
END
$$;
