UPDATE public.settings SET value = NULL WHERE name = 'app.space';
DELETE FROM public.settings WHERE name = 'app.empty';
