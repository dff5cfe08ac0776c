UPDATE public.settings SET value = 'turned by hand, never printed' WHERE name = 'app.token';
DELETE FROM public.settings WHERE name = 'app.session';
