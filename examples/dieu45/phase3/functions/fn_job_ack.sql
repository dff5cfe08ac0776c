CREATE FUNCTION public.fn_job_ack(
    p_job_id uuid,
    p_lease_owner text,
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
BEGIN
    -- Only the word true opens a gate; absent and garbage stay shut.
    IF NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.job_substrate.enabled' AND lower(btrim(c.value)) = 'true'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'queue.job_substrate.enabled=false');
    END IF;

    -- The row is read under its lock: between a plain read and the write a reaper could take the job
    -- away, and the write would bring it back from the dead.
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
    -- Worker names are reused, by a restarted pod for one; the attempt number is not.
    IF p_expected_attempts IS NOT NULL AND p_expected_attempts <> v_job.attempts THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'attempt_mismatch');
    END IF;

    -- After the lock, because waiting for it took time. A late ack of a job that nobody reaped is work
    -- well done, so it counts and is marked late.
    v_now := clock_timestamp();

    UPDATE public.job_queue AS q
    SET state = 'succeeded',
        finished_at = v_now,
        lease_owner = NULL,
        lease_until = NULL
    WHERE q.job_id = p_job_id
      AND q.state = v_job.state
      AND q.lease_owner = v_job.lease_owner
      AND q.attempts = v_job.attempts;

    RETURN jsonb_build_object(
        'refused', false,
        'job_id', p_job_id,
        'state', 'succeeded',
        'late', v_job.lease_until < v_now,
        'attempts', v_job.attempts
    );
END;
$function$;
