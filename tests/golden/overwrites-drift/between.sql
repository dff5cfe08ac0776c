UPDATE public.settings SET value = '3' WHERE name IN ('app.a', 'app.b');
DELETE FROM public.settings WHERE name = 'app.c';
