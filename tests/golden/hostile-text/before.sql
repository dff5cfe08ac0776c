CREATE TABLE public.settings (name text PRIMARY KEY, value text);
INSERT INTO public.settings VALUES
    ('app.real', E'\u001b[2J\u202eeslaf'),
    (E'app.\u001b]0;title\u0007\u001b[1A\u202etxt', 'x'),
    (E'app.line\nNo changes. The database matches the desired state.', 'x');
CREATE FUNCTION public.fn_a() RETURNS text LANGUAGE sql AS E'SELECT text ''\u001b[31m\u2066x\u2069'' ';
COMMENT ON FUNCTION public.fn_a() IS E'\u001b[8mhidden\u001b[0m \u061c\u200f\n  + gate.forged  (declared and missing)';
CREATE FUNCTION public.U&"fn_\0007bell"() RETURNS text LANGUAGE sql AS 'SELECT ''x'' ';
