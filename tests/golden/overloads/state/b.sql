CREATE FUNCTION public.fn_b() RETURNS text LANGUAGE sql AS 'SELECT ''b''';
