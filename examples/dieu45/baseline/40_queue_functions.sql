-- Phase 1's seven functions and the trigger function of job_queue, as they were created then: definition,
-- grants and comment. Whoever adopts or changes them must see them exactly like this.
SET ROLE workflow_admin;

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
REVOKE ALL ON FUNCTION public.fn_job_queue_updated_at() FROM PUBLIC;
COMMENT ON FUNCTION public.fn_job_queue_updated_at() IS 'Sets updated_at on every change of a job.';

CREATE FUNCTION public.fn_job_enqueue(
    p_job_kind text,
    p_actor text,
    p_idempotency_key text,
    p_payload_json jsonb DEFAULT '{}',
    p_source_ref text DEFAULT NULL,
    p_target_ref text DEFAULT NULL,
    p_payload_ref text DEFAULT NULL,
    p_priority integer DEFAULT 100,
    p_run_id uuid DEFAULT NULL,
    p_scheduled_at timestamp with time zone DEFAULT NULL,
    p_max_attempts integer DEFAULT NULL
)
RETURNS jsonb
LANGUAGE plpgsql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    v_now constant timestamp with time zone := clock_timestamp();
    -- Content and secrets never enter the queue: jobs carry references to them.
    v_deny constant text[] := ARRAY['body', 'content', 'raw', 'vector', 'embedding',
                                    'secret', 'token', 'password', 'ssn', 'personal_data'];
    v_denied_keys jsonb;
    v_max_attempts integer;
    v_job_id uuid;
    v_state text;
BEGIN
    -- Only the word true opens a gate. Absent, misspelt and NULL stay shut, and no ::boolean cast
    -- decides: it takes 'on', 'y' and '1' for true and raises on a typing error.
    IF NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.job_substrate.enabled' AND lower(btrim(c.value)) = 'true'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'queue.job_substrate.enabled=false', 'job_id', NULL);
    END IF;

    IF coalesce(btrim(p_job_kind), '') = '' THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'job_kind_required', 'job_id', NULL);
    END IF;
    IF coalesce(btrim(p_actor), '') = '' THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'actor_required', 'job_id', NULL);
    END IF;
    IF coalesce(btrim(p_idempotency_key), '') = '' THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'idempotency_key_required', 'job_id', NULL);
    END IF;
    IF jsonb_typeof(p_payload_json) IS DISTINCT FROM 'object' THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'payload_not_object', 'job_id', NULL);
    END IF;

    -- Every object at every depth, in any letter case. The table's CHECK sees only the top level and
    -- only the exact spelling: it is the backstop, this is the rule. COLLATE "C" keeps lower() the
    -- same in every locale (a Turkish one would not map I to i).
    SELECT jsonb_agg(DISTINCT denied.name ORDER BY denied.name)
    INTO v_denied_keys
    FROM jsonb_path_query(p_payload_json, 'strict $.** ? (@.type() == "object")') AS node (object)
    CROSS JOIN LATERAL jsonb_object_keys(node.object) AS denied (name)
    WHERE lower(btrim(denied.name) COLLATE "C") = ANY (v_deny);
    IF v_denied_keys IS NOT NULL THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'payload_denied', 'job_id', NULL,
                                  'denied_keys', v_denied_keys);
    END IF;

    -- A number that is missing or is not a positive integer reads as the default.
    SELECT substring(btrim(c.value) FROM '^[1-9][0-9]{0,8}$')::integer
    INTO v_max_attempts
    FROM public.dot_config AS c
    WHERE c.key = 'queue.retry.max_attempts_default';
    v_max_attempts := coalesce(p_max_attempts, v_max_attempts, 5);

    -- At most one active job per idempotency key. The partial unique index decides, so that any
    -- number of racing sessions makes one row; the predicate here is the index's own.
    INSERT INTO public.job_queue AS q (
        job_kind, actor, idempotency_key, payload_json, source_ref, target_ref, payload_ref,
        priority, run_id, scheduled_at, max_attempts
    )
    VALUES (
        p_job_kind, p_actor, p_idempotency_key, p_payload_json, p_source_ref, p_target_ref, p_payload_ref,
        coalesce(p_priority, 100), p_run_id, coalesce(p_scheduled_at, v_now), v_max_attempts
    )
    ON CONFLICT (idempotency_key) WHERE state IN ('queued', 'leased', 'in_progress', 'retry_waiting')
    DO NOTHING
    RETURNING q.job_id, q.state INTO v_job_id, v_state;
    IF FOUND THEN
        RETURN jsonb_build_object('refused', false, 'job_id', v_job_id, 'state', v_state, 'deduplicated', false);
    END IF;

    SELECT q.job_id, q.state
    INTO v_job_id, v_state
    FROM public.job_queue AS q
    WHERE q.idempotency_key = p_idempotency_key
      AND q.state IN ('queued', 'leased', 'in_progress', 'retry_waiting');
    IF FOUND THEN
        RETURN jsonb_build_object('refused', false, 'job_id', v_job_id, 'state', v_state, 'deduplicated', true);
    END IF;

    -- The job that held the key finished between the two statements. The call is idempotent, so the
    -- caller repeats it; guessing here would either lose the job or run it twice.
    RETURN jsonb_build_object('refused', true, 'reason', 'idempotency_race', 'job_id', NULL);
END;
$function$;
REVOKE ALL ON FUNCTION public.fn_job_enqueue(text, text, text, jsonb, text, text, text, integer, uuid, timestamp with time zone, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.fn_job_enqueue(text, text, text, jsonb, text, text, text, integer, uuid, timestamp with time zone, integer) TO worker;
COMMENT ON FUNCTION public.fn_job_enqueue(text, text, text, jsonb, text, text, text, integer, uuid, timestamp with time zone, integer) IS 'Adds a job, or returns the active one with the same idempotency key.';

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
REVOKE ALL ON FUNCTION public.fn_job_claim(text, text[], integer, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.fn_job_claim(text, text[], integer, integer) TO worker;
COMMENT ON FUNCTION public.fn_job_claim(text, text[], integer, integer) IS 'Leases jobs that are due to one worker.';

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
REVOKE ALL ON FUNCTION public.fn_job_ack(uuid, text, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.fn_job_ack(uuid, text, integer) TO worker;
COMMENT ON FUNCTION public.fn_job_ack(uuid, text, integer) IS 'Ends a leased job as succeeded.';

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
REVOKE ALL ON FUNCTION public.fn_job_fail(uuid, text, text, boolean, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.fn_job_fail(uuid, text, text, boolean, integer) TO worker;
COMMENT ON FUNCTION public.fn_job_fail(uuid, text, text, boolean, integer) IS 'Ends an attempt of a leased job; it is tried again later or becomes a dead letter.';

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
REVOKE ALL ON FUNCTION public.fn_job_extend_lease(uuid, text, integer, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.fn_job_extend_lease(uuid, text, integer, integer) TO worker;
COMMENT ON FUNCTION public.fn_job_extend_lease(uuid, text, integer, integer) IS 'Prolongs a lease that has not expired.';

CREATE FUNCTION public.fn_queue_heartbeat_tick(
    p_executor_name text,
    p_executor_kind text,
    p_status text DEFAULT 'ok',
    p_current_job_id uuid DEFAULT NULL,
    p_lease_owner text DEFAULT NULL,
    p_metadata jsonb DEFAULT '{}'
)
RETURNS jsonb
LANGUAGE plpgsql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    -- The database's clock, never the caller's and never the frozen now().
    v_now constant timestamp with time zone := clock_timestamp();
    -- A beat is not lost for its decoration: what is no object is left out.
    v_metadata constant jsonb := CASE jsonb_typeof(p_metadata) WHEN 'object' THEN p_metadata ELSE '{}' END;
    v_executor record;
    v_promoted boolean := false;
BEGIN
    -- Only the word true opens a gate; absent and garbage stay shut.
    IF NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.heartbeat.enabled' AND lower(btrim(c.value)) = 'true'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'queue.heartbeat.enabled=false');
    END IF;

    IF coalesce(btrim(p_executor_name), '') = '' THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'executor_name_required');
    END IF;
    -- The vocabulary of the table's CHECK, seven words. A NULL is none of them.
    IF coalesce(p_executor_kind, '') NOT IN (
        'DOT', 'Agent', 'Hermes', 'Codex', 'PG_worker', 'external_worker', 'future_Kestra_adapter'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'invalid_executor_kind');
    END IF;
    IF coalesce(p_status, '') NOT IN ('ok', 'warn', 'error') THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'invalid_status');
    END IF;

    INSERT INTO public.queue_heartbeat AS h (
        executor_name, executor_kind, last_tick_at, last_tick_status, ticks_total, current_job_id, lease_owner, metadata
    )
    VALUES (p_executor_name, p_executor_kind, v_now, p_status, 1, p_current_job_id, p_lease_owner, v_metadata)
    ON CONFLICT (executor_name) DO NOTHING
    RETURNING h.ticks_total, h.last_tick_at INTO v_executor;

    IF NOT FOUND THEN
        SELECT h.executor_kind, h.ticks_total
        INTO STRICT v_executor
        FROM public.queue_heartbeat AS h
        WHERE h.executor_name = p_executor_name
        FOR UPDATE;
        -- One name, one kind: another program that took the name must not keep this one looking alive.
        IF v_executor.executor_kind <> p_executor_kind THEN
            RETURN jsonb_build_object('refused', true, 'reason', 'executor_kind_mismatch');
        END IF;

        -- Passive means that it never ticked. The word in metadata does not decide: it outlives this tick.
        v_promoted := v_executor.ticks_total = 0;

        -- greatest: beats that arrive out of order never turn the clock back.
        UPDATE public.queue_heartbeat AS h
        SET last_tick_at = greatest(h.last_tick_at, v_now),
            last_tick_status = p_status,
            ticks_total = h.ticks_total + 1,
            current_job_id = p_current_job_id,
            lease_owner = p_lease_owner,
            metadata = h.metadata || v_metadata
        WHERE h.executor_name = p_executor_name
        RETURNING h.ticks_total, h.last_tick_at INTO v_executor;
    END IF;

    RETURN jsonb_build_object(
        'refused', false,
        'executor_name', p_executor_name,
        'ticks_total', v_executor.ticks_total,
        'last_tick_at', v_executor.last_tick_at,
        'last_tick_status', p_status,
        'promoted_from_passive', v_promoted
    );
END;
$function$;
REVOKE ALL ON FUNCTION public.fn_queue_heartbeat_tick(text, text, text, uuid, text, jsonb) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.fn_queue_heartbeat_tick(text, text, text, uuid, text, jsonb) TO worker;
COMMENT ON FUNCTION public.fn_queue_heartbeat_tick(text, text, text, uuid, text, jsonb) IS 'One beat of an executor.';

CREATE FUNCTION public.fn_queue_stale_check(
    p_threshold_seconds integer DEFAULT NULL
)
RETURNS jsonb
LANGUAGE plpgsql
STABLE
SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    v_now constant timestamp with time zone := clock_timestamp();
    v_threshold_seconds integer;
    v_stale_count bigint;
    v_fresh_count bigint;
    v_executors jsonb;
BEGIN
    -- A number that is missing or is not a positive integer reads as the default.
    SELECT substring(btrim(c.value) FROM '^[1-9][0-9]{0,8}$')::integer
    INTO v_threshold_seconds
    FROM public.dot_config AS c
    WHERE c.key = 'queue.heartbeat.stale_threshold_seconds';
    v_threshold_seconds := greatest(coalesce(p_threshold_seconds, v_threshold_seconds, 300), 0);

    -- A pure read: silence is reported, and nothing is concluded from it. Jobs are taken from an
    -- executor only by an expired lease, never by a missing beat.
    SELECT count(*) FILTER (WHERE e.stale),
           count(*) FILTER (WHERE NOT e.stale),
           coalesce(
               jsonb_agg(
                   jsonb_build_object(
                       'executor_name', e.executor_name,
                       'executor_kind', e.executor_kind,
                       'last_tick_at', e.last_tick_at,
                       'last_tick_status', e.last_tick_status,
                       'ticks_total', e.ticks_total,
                       'age_seconds', e.age_seconds,
                       'passive', e.ticks_total = 0
                   )
                   ORDER BY e.last_tick_at, e.executor_name
               ) FILTER (WHERE e.stale),
               '[]'
           )
    INTO v_stale_count, v_fresh_count, v_executors
    FROM (
        SELECT h.executor_name, h.executor_kind, h.last_tick_at, h.last_tick_status, h.ticks_total,
               floor(extract(epoch FROM v_now - h.last_tick_at))::bigint AS age_seconds,
               h.last_tick_at < v_now - make_interval(secs => v_threshold_seconds) AS stale
        FROM public.queue_heartbeat AS h
    ) AS e;

    -- executors lists the stale ones, the longest silent first.
    RETURN jsonb_build_object(
        'refused', false,
        'stale_count', v_stale_count,
        'fresh_count', v_fresh_count,
        'threshold_seconds', v_threshold_seconds,
        'checked_at', v_now,
        'executors', v_executors
    );
END;
$function$;
REVOKE ALL ON FUNCTION public.fn_queue_stale_check(integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.fn_queue_stale_check(integer) TO operator, reader, worker;
COMMENT ON FUNCTION public.fn_queue_stale_check(integer) IS 'Counts fresh and stale executors and lists the stale ones.';

CREATE TRIGGER trg_job_queue_updated_at
    BEFORE UPDATE ON public.job_queue
    FOR EACH ROW EXECUTE FUNCTION public.fn_job_queue_updated_at();

RESET ROLE;
