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
