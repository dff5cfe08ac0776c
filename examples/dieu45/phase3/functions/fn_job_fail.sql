CREATE FUNCTION public.fn_job_fail(
    p_job_id uuid,
    p_lease_owner text,
    p_error text,
    p_retryable boolean DEFAULT true,
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
    v_attempts integer;
    v_backoff_base integer;
    v_backoff_sec integer;
    v_scheduled_at timestamp with time zone;
    v_dead_letter_id uuid;
BEGIN
    -- Only the word true opens a gate; absent and garbage stay shut.
    IF NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.job_substrate.enabled' AND lower(btrim(c.value)) = 'true'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'queue.job_substrate.enabled=false');
    END IF;

    -- Read under the row's lock, like every step that ends a lease.
    SELECT q.*
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
    -- Without the fence, the late failure of an older attempt would end the newer one.
    IF p_expected_attempts IS NOT NULL AND p_expected_attempts <> v_job.attempts THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'attempt_mismatch');
    END IF;

    v_now := clock_timestamp();
    v_attempts := v_job.attempts + 1;

    IF coalesce(p_retryable, true) AND v_attempts < v_job.max_attempts THEN
        -- A number that is missing or is not a positive integer reads as the default.
        SELECT substring(btrim(c.value) FROM '^[1-9][0-9]{0,8}$')::integer
        INTO v_backoff_base
        FROM public.dot_config AS c
        WHERE c.key = 'queue.retry.backoff_base_sec';
        -- Doubling from the base: 10, 20, 40, 80 seconds, one hour at most. attempts - 1, because the
        -- count has just gone up and the first retry waits the base itself. No jitter: it is provable.
        v_backoff_sec := least(3600, coalesce(v_backoff_base, 10) * 2 ^ least(v_attempts - 1, 20))::integer;
        v_scheduled_at := v_now + make_interval(secs => v_backoff_sec);

        UPDATE public.job_queue AS q
        SET state = 'retry_waiting',
            attempts = v_attempts,
            scheduled_at = v_scheduled_at,
            lease_owner = NULL,
            lease_until = NULL,
            last_error = p_error
        WHERE q.job_id = p_job_id
          AND q.state = v_job.state
          AND q.lease_owner = v_job.lease_owner
          AND q.attempts = v_job.attempts;

        RETURN jsonb_build_object(
            'refused', false,
            'state', 'retry_waiting',
            'attempts', v_attempts,
            'backoff_sec', v_backoff_sec,
            'scheduled_at', v_scheduled_at,
            'dead_letter_id', NULL
        );
    END IF;

    UPDATE public.job_queue AS q
    SET state = 'dead_letter',
        attempts = v_attempts,
        finished_at = v_now,
        lease_owner = NULL,
        lease_until = NULL,
        last_error = p_error
    WHERE q.job_id = p_job_id
      AND q.state = v_job.state
      AND q.lease_owner = v_job.lease_owner
      AND q.attempts = v_job.attempts;

    -- One letter per job, ever. A letter that is already there is kept as it was triaged.
    INSERT INTO public.job_dead_letter AS d (
        job_id, job_kind, idempotency_key, source_ref, target_ref, payload_ref, payload_json, priority, actor,
        run_id, attempts, max_attempts, last_error, last_lease_owner, dead_letter_reason, dead_lettered_by,
        dead_lettered_at
    )
    VALUES (
        v_job.job_id, v_job.job_kind, v_job.idempotency_key, v_job.source_ref, v_job.target_ref, v_job.payload_ref,
        v_job.payload_json, v_job.priority, v_job.actor, v_job.run_id, v_attempts, v_job.max_attempts, p_error,
        v_job.lease_owner, CASE WHEN coalesce(p_retryable, true) THEN 'max_attempts' ELSE 'non_retryable' END,
        v_job.lease_owner, v_now
    )
    ON CONFLICT (job_id) DO NOTHING
    RETURNING d.dead_letter_id INTO v_dead_letter_id;
    IF NOT FOUND THEN
        SELECT d.dead_letter_id
        INTO v_dead_letter_id
        FROM public.job_dead_letter AS d
        WHERE d.job_id = p_job_id;
    END IF;

    RETURN jsonb_build_object(
        'refused', false,
        'state', 'dead_letter',
        'attempts', v_attempts,
        'backoff_sec', NULL,
        'scheduled_at', NULL,
        'dead_letter_id', v_dead_letter_id
    );
END;
$function$;
