CREATE FUNCTION public.fn_a(p text) RETURNS text LANGUAGE sql AS 'SELECT p';
