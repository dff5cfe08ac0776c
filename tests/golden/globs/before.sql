CREATE TABLE public.settings (name text PRIMARY KEY, value text);
INSERT INTO public.settings VALUES
    ('a.b', '1'), ('aXb', '1'), ('a.bc', '1'), ('(x|y)', '1'), ('x', '1'), ('50%', '1'), ('fn_a', '1'), ('fnXa', '1'),
    (E'c\\d', '1'), (E'line\nend', '1'), ('ก', '1'), ('^s$', '1'), ('***=x', '1');
CREATE FUNCTION public.fn_a() RETURNS integer LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION public.fnxa() RETURNS integer LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION public.fn_ab() RETURNS integer LANGUAGE sql AS 'SELECT 1';
