CREATE FUNCTION public.fn_a() RETURNS text LANGUAGE sql AS 'SELECT ''x''';
