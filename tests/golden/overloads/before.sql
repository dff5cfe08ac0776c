GRANT USAGE, CREATE ON SCHEMA public TO golden_owner;
CREATE FUNCTION public.fn_a(p text) RETURNS text LANGUAGE sql AS 'SELECT p';
CREATE FUNCTION public.fn_a() RETURNS text LANGUAGE sql AS $$SELECT 'undeclared'$$;
