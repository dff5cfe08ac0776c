CREATE FUNCTION public.fn_a(p text, VARIADIC q text[]) RETURNS text LANGUAGE sql AS 'SELECT p';
