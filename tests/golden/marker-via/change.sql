DELETE FROM public.workers;
