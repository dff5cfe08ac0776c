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
