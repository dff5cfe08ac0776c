CREATE FUNCTION public.fn_queue_heartbeat_register_passive(
    p_executor_name text,
    p_executor_kind text,
    p_last_observed_at timestamp with time zone,
    p_actor text,
    p_note text DEFAULT NULL
)
RETURNS jsonb
LANGUAGE plpgsql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    -- The database's clock, never the frozen now().
    v_now constant timestamp with time zone := clock_timestamp();
BEGIN
    -- Only the word true opens a gate; absent and garbage stay shut.
    IF NOT EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.heartbeat.enabled' AND lower(btrim(c.value)) = 'true'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'queue.heartbeat.enabled=false');
    END IF;

    IF coalesce(btrim(p_actor), '') = '' THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'actor_required');
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
    -- There is no default: now() would make a worker that is silent for days look fresh. Minus infinity
    -- is no observation either, and no age can be computed from it.
    IF p_last_observed_at IS NULL OR p_last_observed_at = '-infinity' THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'last_observed_at_required');
    END IF;
    -- The one time stamp that a client may send. One from the future would hide the silence until then.
    IF p_last_observed_at > v_now THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'last_observed_at_in_future');
    END IF;

    -- Insert only. Whoever has a row, passive or ticking, keeps it to the byte: a marker must never
    -- overwrite a beat, and repeating the call changes nothing. ticks_total 0 is what makes it passive.
    INSERT INTO public.queue_heartbeat (
        executor_name, executor_kind, last_tick_at, last_tick_status, ticks_total, metadata
    )
    VALUES (
        p_executor_name, p_executor_kind, p_last_observed_at, 'warn', 0,
        jsonb_build_object(
            'marker', 'legacy_silent_passive',
            'source', 'fn_queue_heartbeat_register_passive',
            'registered_at', v_now,
            'registered_by', p_actor,
            'note', p_note
        )
    )
    ON CONFLICT (executor_name) DO NOTHING;
    IF NOT FOUND THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'already_registered');
    END IF;

    RETURN jsonb_build_object(
        'refused', false,
        'passive', true,
        'last_tick_at', p_last_observed_at,
        'last_tick_status', 'warn',
        'ticks_total', 0
    );
END;
$function$;
