CREATE PROCEDURE public.pr_new(IN p_name text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE NOTICE '%', p_name;
END
$$;
