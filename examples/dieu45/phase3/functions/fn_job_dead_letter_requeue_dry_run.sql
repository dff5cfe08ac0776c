CREATE FUNCTION public.fn_job_dead_letter_requeue_dry_run(
    p_dead_letter_id uuid
)
RETURNS jsonb
LANGUAGE plpgsql
STABLE
SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    v_letter record;
    v_replay_enabled boolean;
    v_colliding_job_id uuid;
    v_blockers text[] := ARRAY[]::text[];
BEGIN
    SELECT d.dead_letter_id, d.job_id, d.job_kind, d.idempotency_key, d.triage_status
    INTO v_letter
    FROM public.job_dead_letter AS d
    WHERE d.dead_letter_id = p_dead_letter_id;
    IF NOT FOUND THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'dead_letter_not_found');
    END IF;

    -- Only the word true opens a gate; absent and garbage stay shut.
    v_replay_enabled := EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.dlq.replay_enabled' AND lower(btrim(c.value)) = 'true'
    );

    -- A replay keeps the original idempotency key, because whoever removes duplicates downstream must
    -- see the same unit of work. So it collides with a job that took the key since; the unique index
    -- allows one such job at most.
    SELECT q.job_id
    INTO v_colliding_job_id
    FROM public.job_queue AS q
    WHERE q.idempotency_key = v_letter.idempotency_key
      AND q.state IN ('queued', 'leased', 'in_progress', 'retry_waiting');

    -- All that stands in the way, in the order in which a replay would refuse; the first one wins.
    IF NOT v_replay_enabled THEN
        v_blockers := v_blockers || 'queue.dlq.replay_enabled=false'::text;
    END IF;
    IF v_letter.triage_status <> 'manual_replay' THEN
        v_blockers := v_blockers || ('triage_status=' || v_letter.triage_status);
    END IF;
    IF v_colliding_job_id IS NOT NULL THEN
        v_blockers := v_blockers || ('idempotency_collision=' || v_colliding_job_id);
    END IF;

    RETURN jsonb_build_object(
        'refused', false,
        'dead_letter_id', v_letter.dead_letter_id,
        'job_id', v_letter.job_id,
        'job_kind', v_letter.job_kind,
        'triage_status', v_letter.triage_status,
        'replay_gate_enabled', v_replay_enabled,
        'idempotency_collision', v_colliding_job_id IS NOT NULL,
        'colliding_job_id', v_colliding_job_id,
        'blockers', to_jsonb(v_blockers),
        'would_action', coalesce(
            'refused: ' || v_blockers[1],
            format('requeue: job_kind=%s idempotency_key=%s', v_letter.job_kind, v_letter.idempotency_key)
        )
    );
END;
$function$;
