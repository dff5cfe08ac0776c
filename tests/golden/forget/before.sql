CREATE TABLE public.settings (name text PRIMARY KEY, value text);
GRANT USAGE, CREATE ON SCHEMA public TO golden_owner;
INSERT INTO public.settings VALUES ('app.a', '1'), ('app.b', '1');
