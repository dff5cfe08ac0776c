CREATE FUNCTION public.fn_job_extend_lease(
    p_job_id uuid,
    p_lease_owner text,
    p_lease_seconds integer DEFAULT NULL,
    p_expected_attempts integer DEFAULT NULL
)
RETURNS jsonb
LANGUAGE plpgsql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    v_job record;
    v_now timestamp with time zone;
    v_lease_seconds integer;
    v_lease_until timestamp with time zone;
BEGIN
    -- Only the word true opens a gate; absent and garbage stay shut.
    IF NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.job_substrate.enabled' AND lower(btrim(c.value)) = 'true'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'queue.job_substrate.enabled=false');
    END IF;

    -- Read under the row's lock, like every step that changes a lease.
    SELECT q.state, q.lease_owner, q.lease_until, q.attempts
    INTO v_job
    FROM public.job_queue AS q
    WHERE q.job_id = p_job_id
    FOR UPDATE;
    IF NOT FOUND THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'not_found');
    END IF;
    IF v_job.state NOT IN ('leased', 'in_progress') THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'not_leased');
    END IF;
    -- Whoever names no owner owns nothing.
    IF p_lease_owner IS NULL OR v_job.lease_owner IS DISTINCT FROM p_lease_owner THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'lease_mismatch');
    END IF;
    IF p_expected_attempts IS NOT NULL AND p_expected_attempts <> v_job.attempts THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'attempt_mismatch');
    END IF;

    -- After the lock, because waiting for it may have outlived the lease. An expired lease is not
    -- revived: from then on the job is the reaper's to give away.
    v_now := clock_timestamp();
    IF v_job.lease_until < v_now THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'lease_expired');
    END IF;

    -- A number that is missing or is not a positive integer reads as the default.
    SELECT substring(btrim(c.value) FROM '^[1-9][0-9]{0,8}$')::integer
    INTO v_lease_seconds
    FROM public.dot_config AS c
    WHERE c.key = 'queue.lease.duration_sec';
    v_lease_seconds := greatest(coalesce(p_lease_seconds, v_lease_seconds, 300), 1);
    -- An extension never shortens.
    v_lease_until := greatest(v_job.lease_until, v_now + make_interval(secs => v_lease_seconds));

    UPDATE public.job_queue AS q
    SET state = 'in_progress',
        lease_until = v_lease_until
    WHERE q.job_id = p_job_id
      AND q.state = v_job.state
      AND q.lease_owner = v_job.lease_owner
      AND q.attempts = v_job.attempts;

    RETURN jsonb_build_object('refused', false, 'state', 'in_progress', 'lease_until', v_lease_until);
END;
$function$;
