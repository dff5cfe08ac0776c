CREATE FUNCTION public.fn_e() RETURNS integer LANGUAGE sql AS 'SELECT 1';
DROP TABLE public.settings;
