CREATE FUNCTION public.fn_job_queue_updated_at()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp
AS $function$
BEGIN
    -- clock_timestamp(), not now(): two changes in one transaction are two moments.
    NEW.updated_at := clock_timestamp();
    RETURN NEW;
END;
$function$;
