CREATE TABLE public.settings (name text PRIMARY KEY, value text);
