UPDATE public.settings SET value = E'\u001b[2J' WHERE name = 'app.real';
