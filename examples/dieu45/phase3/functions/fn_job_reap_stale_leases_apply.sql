CREATE FUNCTION public.fn_job_reap_stale_leases_apply(
    p_actor text,
    p_limit integer DEFAULT 100
)
RETURNS jsonb
LANGUAGE plpgsql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    -- The wall clock, because now() stands still from BEGIN on. Bound once, because a volatile call
    -- inside WHERE cannot be an index condition: every live lease would be read.
    v_now constant timestamp with time zone := clock_timestamp();
    v_backoff_base integer;
    v_job record;
    v_attempts integer;
    v_backoff_sec integer;
    v_scheduled_at timestamp with time zone;
    v_last_error text;
    v_dead_letter_id uuid;
    v_reset_count integer := 0;
    v_dead_letter_count integer := 0;
    v_jobs jsonb := '[]';
BEGIN
    -- Three gates, from the widest to the narrowest. Only the word true opens the first two. The third
    -- has the opposite polarity: true is its safe value, so anything but the word false keeps it shut,
    -- absence and spelling mistakes included.
    IF NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.job_substrate.enabled' AND lower(btrim(c.value)) = 'true'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'queue.job_substrate.enabled=false', 'reaped_count', 0);
    END IF;
    IF NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.lease.reaper_enabled' AND lower(btrim(c.value)) = 'true'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'queue.lease.reaper_enabled=false', 'reaped_count', 0);
    END IF;
    IF NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.lease.reaper_dry_run_only' AND c.value = 'false'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'queue.lease.reaper_dry_run_only=true', 'reaped_count', 0);
    END IF;

    IF coalesce(btrim(p_actor), '') = '' THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'actor_required', 'reaped_count', 0);
    END IF;

    -- A number that is missing or is not a positive integer reads as the default.
    SELECT substring(btrim(c.value) FROM '^[1-9][0-9]{0,8}$')::integer
    INTO v_backoff_base
    FROM public.dot_config AS c
    WHERE c.key = 'queue.retry.backoff_base_sec';
    v_backoff_base := coalesce(v_backoff_base, 10);

    -- Read and write under one row lock: a job that its worker acknowledges in between must not come
    -- back. SKIP LOCKED, so that the reaper never waits for a worker (who holds the row is at work on
    -- it) and any number of reapers may run. Only rows that can be reaped are selected, the longest
    -- expired first, so that no batch fills up with others.
    FOR v_job IN
        SELECT q.*
        FROM public.job_queue AS q
        WHERE q.state IN ('leased', 'in_progress') AND q.lease_until < v_now
        ORDER BY q.lease_until, q.job_id
        LIMIT greatest(coalesce(p_limit, 100), 0)
        FOR UPDATE SKIP LOCKED
    LOOP
        -- An expired lease is a failed attempt. It is counted here and not at the claim, so that a job
        -- that succeeds at once ends with 0.
        v_attempts := v_job.attempts + 1;
        v_last_error := format(
            'lease_expired owner=%s lease_until=%s reaped_by=%s',
            v_job.lease_owner,
            to_char(v_job.lease_until AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
            p_actor
        );

        IF v_attempts < v_job.max_attempts THEN
            -- Doubling from the base: 10, 20, 40, 80 seconds, one hour at most; the first retry waits
            -- the base itself.
            v_backoff_sec := least(3600, v_backoff_base * 2 ^ least(v_attempts - 1, 20))::integer;
            v_scheduled_at := clock_timestamp() + make_interval(secs => v_backoff_sec);

            -- Compare and set on the lease that was read. The lock makes a difference impossible today;
            -- the condition keeps it so when someone changes the lock.
            UPDATE public.job_queue AS q
            SET state = 'retry_waiting',
                attempts = v_attempts,
                scheduled_at = v_scheduled_at,
                lease_owner = NULL,
                lease_until = NULL,
                last_error = v_last_error
            WHERE q.job_id = v_job.job_id
              AND q.state = v_job.state
              AND q.lease_owner = v_job.lease_owner
              AND q.lease_until = v_job.lease_until
              AND q.attempts = v_job.attempts;
            CONTINUE WHEN NOT FOUND;

            v_reset_count := v_reset_count + 1;
            v_jobs := v_jobs || jsonb_build_object(
                'job_id', v_job.job_id,
                'action', 'retry_waiting',
                'attempts', v_attempts,
                'backoff_sec', v_backoff_sec,
                'scheduled_at', v_scheduled_at
            );
        ELSE
            UPDATE public.job_queue AS q
            SET state = 'dead_letter',
                attempts = v_attempts,
                finished_at = v_now,
                lease_owner = NULL,
                lease_until = NULL,
                last_error = v_last_error
            WHERE q.job_id = v_job.job_id
              AND q.state = v_job.state
              AND q.lease_owner = v_job.lease_owner
              AND q.lease_until = v_job.lease_until
              AND q.attempts = v_job.attempts;
            CONTINUE WHEN NOT FOUND;

            -- One letter per job, ever. A job that already has one must not abort the whole batch; the
            -- letter stays as it was triaged.
            INSERT INTO public.job_dead_letter AS d (
                job_id, job_kind, idempotency_key, source_ref, target_ref, payload_ref, payload_json, priority, actor,
                run_id, attempts, max_attempts, last_error, last_lease_owner, dead_letter_reason, dead_lettered_by,
                dead_lettered_at
            )
            VALUES (
                v_job.job_id, v_job.job_kind, v_job.idempotency_key, v_job.source_ref, v_job.target_ref,
                v_job.payload_ref, v_job.payload_json, v_job.priority, v_job.actor, v_job.run_id, v_attempts,
                v_job.max_attempts, v_last_error, v_job.lease_owner, 'lease_expired_max_attempts', p_actor, v_now
            )
            ON CONFLICT (job_id) DO NOTHING
            RETURNING d.dead_letter_id INTO v_dead_letter_id;
            IF NOT FOUND THEN
                SELECT d.dead_letter_id
                INTO v_dead_letter_id
                FROM public.job_dead_letter AS d
                WHERE d.job_id = v_job.job_id;
            END IF;

            v_dead_letter_count := v_dead_letter_count + 1;
            v_jobs := v_jobs || jsonb_build_object(
                'job_id', v_job.job_id,
                'action', 'dead_letter',
                'attempts', v_attempts,
                'dead_letter_id', v_dead_letter_id
            );
        END IF;
    END LOOP;

    RETURN jsonb_build_object(
        'refused', false,
        'actor', p_actor,
        'reaped_count', v_reset_count + v_dead_letter_count,
        'reset_count', v_reset_count,
        'dead_letter_count', v_dead_letter_count,
        'jobs', v_jobs
    );
END;
$function$;
