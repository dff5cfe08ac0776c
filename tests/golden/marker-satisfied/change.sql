UPDATE public.workers SET kind = 'active', beats = 17, last_beat = now();
UPDATE public.cursors SET at = now();
