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
