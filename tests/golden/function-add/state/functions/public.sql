CREATE FUNCTION public.fn_public(p text, OUT length integer, OUT upper text) LANGUAGE sql IMMUTABLE
AS $$ SELECT pg_catalog.length(p), pg_catalog.upper(p) $$;
