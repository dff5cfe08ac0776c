GRANT USAGE, CREATE ON SCHEMA public TO golden_owner;
CREATE FUNCTION public.fn_one(p_number integer) RETURNS bigint LANGUAGE sql AS 'SELECT 1';
ALTER FUNCTION public.fn_one(integer) OWNER TO golden_owner;
