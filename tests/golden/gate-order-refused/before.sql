CREATE TABLE public.settings (name text PRIMARY KEY, value text, touched timestamptz);
INSERT INTO public.settings VALUES ('app.phase', 'third', '2026-05-22 11:31:41+00'), ('app.other', 'unknown', NULL);
