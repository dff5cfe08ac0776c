CREATE FUNCTION public.fn_job_claim(
    p_lease_owner text,
    p_job_kinds text[] DEFAULT NULL,
    p_limit integer DEFAULT 1,
    p_lease_seconds integer DEFAULT NULL
)
RETURNS jsonb
LANGUAGE plpgsql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    -- Leases run on the wall clock. now() stands still from BEGIN on: a short lease taken late in a
    -- long transaction would be born expired. It is bound here once, because a volatile call inside
    -- WHERE cannot be an index condition.
    v_now constant timestamp with time zone := clock_timestamp();
    v_lease_seconds integer;
    v_jobs jsonb;
BEGIN
    -- Only the word true opens a gate; absent and garbage stay shut.
    IF NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.job_substrate.enabled' AND lower(btrim(c.value)) = 'true'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'queue.job_substrate.enabled=false');
    END IF;

    IF coalesce(btrim(p_lease_owner), '') = '' THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'lease_owner_required');
    END IF;

    -- A number that is missing or is not a positive integer reads as the default.
    SELECT substring(btrim(c.value) FROM '^[1-9][0-9]{0,8}$')::integer
    INTO v_lease_seconds
    FROM public.dot_config AS c
    WHERE c.key = 'queue.lease.duration_sec';
    v_lease_seconds := greatest(coalesce(p_lease_seconds, v_lease_seconds, 300), 1);

    -- SKIP LOCKED: claimers never wait for each other and never get the same row. The UPDATE compares
    -- the state again, so that a row can be taken only in the state in which it was picked.
    -- attempts is left alone: it counts failures, and (job_id, attempts) is the fence that tells a
    -- worker whether the lease is still the one it took.
    WITH picked AS (
        SELECT q.job_id, q.state
        FROM public.job_queue AS q
        WHERE q.state IN ('queued', 'retry_waiting')
          AND q.scheduled_at <= v_now
          AND (p_job_kinds IS NULL OR q.job_kind = ANY (p_job_kinds))
        ORDER BY q.priority, q.scheduled_at, q.job_id
        LIMIT greatest(coalesce(p_limit, 1), 0)
        FOR UPDATE SKIP LOCKED
    ), claimed AS (
        UPDATE public.job_queue AS q
        SET state = 'leased',
            picked_at = v_now,
            lease_owner = p_lease_owner,
            lease_until = v_now + make_interval(secs => v_lease_seconds)
        FROM picked
        WHERE q.job_id = picked.job_id AND q.state = picked.state
        RETURNING q.*
    )
    SELECT coalesce(
        jsonb_agg(
            jsonb_build_object(
                'job_id', j.job_id,
                'job_kind', j.job_kind,
                'source_ref', j.source_ref,
                'target_ref', j.target_ref,
                'payload_ref', j.payload_ref,
                'payload_json', j.payload_json,
                'priority', j.priority,
                'attempts', j.attempts,
                'max_attempts', j.max_attempts,
                'idempotency_key', j.idempotency_key,
                'run_id', j.run_id,
                'lease_until', j.lease_until
            )
            ORDER BY j.priority, j.scheduled_at, j.job_id
        ),
        '[]'
    )
    INTO v_jobs
    FROM claimed AS j;

    RETURN jsonb_build_object(
        'refused', false,
        'claimed_count', jsonb_array_length(v_jobs),
        'lease_seconds', v_lease_seconds,
        'jobs', v_jobs
    );
END;
$function$;
