CREATE TABLE public.settings (name text UNIQUE, value text, note text, touched timestamptz);
INSERT INTO public.settings VALUES
    ('app.null', NULL, 'stays', '2020-01-01'), ('app.quote', 'it''s', 'stays', '2020-01-01'),
    ('app.space', 'a', 'stays', '2020-01-01');
