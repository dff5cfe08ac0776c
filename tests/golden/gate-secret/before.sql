CREATE TABLE public.settings (name text PRIMARY KEY, value text);
INSERT INTO public.settings VALUES ('app.token', 'the old token, never printed'), ('app.empty', NULL);
