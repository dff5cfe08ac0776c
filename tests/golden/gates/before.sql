CREATE TABLE public.settings (name text PRIMARY KEY, value text);
INSERT INTO public.settings VALUES
    ('app.enabled', 'false'), ('app.limit', '100'), ('app.undeclared', 'x'), ('other.key', 'not in scope');
