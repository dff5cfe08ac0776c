CREATE FUNCTION public.fn_job_reap_stale_leases_dry_run(
    p_limit integer DEFAULT 100
)
RETURNS jsonb
LANGUAGE plpgsql
STABLE
SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    -- Bound once: lease_until < clock_timestamp() could not use the index on lease_until.
    v_now constant timestamp with time zone := clock_timestamp();
    v_substrate_enabled boolean;
    v_reaper_enabled boolean;
    v_dry_run_only boolean;
    v_backoff_base integer;
    v_stale_count bigint;
    v_jobs jsonb;
BEGIN
    -- The gates as apply would read them: only the word true arms, and only the word false lifts
    -- dry_run_only, whose safe value is true. They are reported, they do not stop a preview.
    v_substrate_enabled := EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.job_substrate.enabled' AND lower(btrim(c.value)) = 'true'
    );
    v_reaper_enabled := EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.lease.reaper_enabled' AND lower(btrim(c.value)) = 'true'
    );
    v_dry_run_only := NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.lease.reaper_dry_run_only' AND c.value = 'false'
    );

    -- A number that is missing or is not a positive integer reads as the default.
    SELECT substring(btrim(c.value) FROM '^[1-9][0-9]{0,8}$')::integer
    INTO v_backoff_base
    FROM public.dot_config AS c
    WHERE c.key = 'queue.retry.backoff_base_sec';
    v_backoff_base := coalesce(v_backoff_base, 10);

    SELECT count(*)
    INTO v_stale_count
    FROM public.job_queue AS q
    WHERE q.state IN ('leased', 'in_progress') AND q.lease_until < v_now;

    -- The same rows in the same order as apply takes them, but without their locks: a STABLE function
    -- may not lock. So this is advice; a worker may still acknowledge a job that is listed here.
    SELECT coalesce(
        jsonb_agg(
            jsonb_build_object(
                'job_id', j.job_id,
                'job_kind', j.job_kind,
                'state', j.state,
                'lease_owner', j.lease_owner,
                'lease_until', j.lease_until,
                'age_seconds', floor(extract(epoch FROM v_now - j.lease_until))::bigint,
                'attempts', j.attempts,
                'max_attempts', j.max_attempts,
                'next_attempts', j.next_attempts,
                'would_action', CASE WHEN j.next_attempts < j.max_attempts THEN 'retry_waiting' ELSE 'dead_letter' END,
                'backoff_sec', CASE WHEN j.next_attempts < j.max_attempts
                                    THEN least(3600, v_backoff_base * 2 ^ least(j.next_attempts - 1, 20))::integer
                               END
            )
            ORDER BY j.lease_until, j.job_id
        ),
        '[]'
    )
    INTO v_jobs
    FROM (
        SELECT q.job_id, q.job_kind, q.state, q.lease_owner, q.lease_until, q.attempts, q.max_attempts,
               q.attempts + 1 AS next_attempts
        FROM public.job_queue AS q
        WHERE q.state IN ('leased', 'in_progress') AND q.lease_until < v_now
        ORDER BY q.lease_until, q.job_id
        LIMIT greatest(coalesce(p_limit, 100), 0)
    ) AS j;

    RETURN jsonb_build_object(
        'refused', false,
        'dry_run', true,
        'stale_count', v_stale_count,
        'listed_count', jsonb_array_length(v_jobs),
        'checked_at', v_now,
        'gates', jsonb_build_object(
            'queue.job_substrate.enabled', v_substrate_enabled,
            'queue.lease.reaper_enabled', v_reaper_enabled,
            'queue.lease.reaper_dry_run_only', v_dry_run_only
        ),
        'apply_would_refuse', NOT (v_substrate_enabled AND v_reaper_enabled AND NOT v_dry_run_only),
        'jobs', v_jobs
    );
END;
$function$;
