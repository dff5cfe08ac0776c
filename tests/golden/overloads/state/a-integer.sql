CREATE FUNCTION public.fn_a(p integer) RETURNS text LANGUAGE sql AS 'SELECT public.fn_b()';
