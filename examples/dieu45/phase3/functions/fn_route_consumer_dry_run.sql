CREATE FUNCTION public.fn_route_consumer_dry_run(
    p_route_code text,
    p_limit integer DEFAULT 100
)
RETURNS jsonb
LANGUAGE plpgsql
STABLE
SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    v_route record;
    v_cursor record;
    v_after_created_at timestamp with time zone;
    v_after_id uuid;
    v_substrate_enabled boolean;
    v_pilot_job_kind text;
    v_job_kind text;
    v_blocker text;
    v_backlog bigint;
    v_would_enqueue jsonb;
BEGIN
    SELECT r.route_code, r.event_domain, r.event_type, r.target_kind, r.enabled, r.dry_run
    INTO v_route
    FROM public.iu_sql_event_route AS r
    WHERE r.route_code = p_route_code;
    IF NOT FOUND THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'route_not_found');
    END IF;
    -- A preview of a route that delivers for real would promise that nothing happens. It cannot.
    IF NOT v_route.dry_run THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'route_not_dry_run');
    END IF;

    -- Several workers may read one domain. The one that is furthest behind decides: it lists too much
    -- rather than too little, and an event that is enqueued twice is one job, by its idempotency key.
    SELECT c.worker_name, c.last_created_at, c.last_event_id, c.last_run_at
    INTO v_cursor
    FROM public.iu_route_worker_cursor AS c
    WHERE c.event_domain = v_route.event_domain
    ORDER BY c.last_created_at NULLS FIRST, c.last_event_id NULLS FIRST, c.worker_name
    LIMIT 1;
    IF NOT FOUND THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'cursor_not_found');
    END IF;

    -- Only the word true opens a gate; absent and garbage stay shut.
    v_substrate_enabled := EXISTS (
        SELECT FROM public.dot_config AS c
        WHERE c.key = 'queue.job_substrate.enabled' AND lower(btrim(c.value)) = 'true'
    );
    -- The one kind of job that the pilot is about. Absent means none.
    SELECT btrim(c.value)
    INTO v_pilot_job_kind
    FROM public.dot_config AS c
    WHERE c.key = 'queue.route.pilot_job_kind';
    v_job_kind := 'route.' || v_route.event_type;

    -- What stands in the way of every event of this route, in the order in which a consumer would ask;
    -- the first one wins. It is reported, it does not stop a preview.
    v_blocker := CASE
        WHEN NOT v_substrate_enabled THEN 'queue.job_substrate.enabled=false'
        WHEN v_pilot_job_kind IS DISTINCT FROM v_job_kind
            THEN 'queue.route.pilot_job_kind=' || coalesce(v_pilot_job_kind, '')
        WHEN NOT v_route.enabled THEN 'route_disabled'
        WHEN v_route.target_kind <> 'job' THEN 'target_kind=' || v_route.target_kind
    END;

    -- A cursor that never read anything has no position: everything is still ahead of it.
    v_after_created_at := coalesce(v_cursor.last_created_at, '-infinity');
    v_after_id := coalesce(v_cursor.last_event_id, '00000000-0000-0000-0000-000000000000');

    -- The position is a pair of keys, and created_at is the time at which a transaction began: a row that
    -- is committed late, with an earlier created_at, lies behind a cursor that moved on, and is missing
    -- here. Whoever enqueues for real holds the latest events back for longer than any transaction lasts.
    SELECT count(*)
    INTO v_backlog
    FROM public.event_outbox AS e
    WHERE e.event_domain = v_route.event_domain
      AND e.event_type = v_route.event_type
      AND (e.created_at, e.id) > (v_after_created_at, v_after_id);

    -- References only: what the event is about is looked up by whoever does the job.
    SELECT coalesce(
        jsonb_agg(
            jsonb_build_object(
                'job_kind', v_job_kind,
                'idempotency_key', e.idempotency_key,
                'source_ref', e.source_ref,
                'target_ref', e.target_ref,
                'payload_json', e.payload_json,
                'would_action', coalesce(
                    'refused: ' || v_blocker,
                    'deduplicate: job_id=' || q.job_id,
                    'enqueue: job_kind=' || v_job_kind || ' idempotency_key=' || e.idempotency_key
                )
            )
            ORDER BY e.created_at, e.id
        ),
        '[]'
    )
    INTO v_would_enqueue
    FROM (
        SELECT o.created_at,
               o.id,
               'route:' || v_route.route_code || ':' || o.id AS idempotency_key,
               'event_outbox:' || o.id AS source_ref,
               coalesce(o.canonical_address, o.event_subject_table || ':' || o.event_subject_ref) AS target_ref,
               jsonb_build_object(
                   'event_id', o.id,
                   'event_type', o.event_type,
                   'subject_table', o.event_subject_table,
                   'subject_ref', o.event_subject_ref,
                   'canonical_address', o.canonical_address,
                   'correlation_id', o.correlation_id
               ) AS payload_json
        FROM public.event_outbox AS o
        WHERE o.event_domain = v_route.event_domain
          AND o.event_type = v_route.event_type
          AND (o.created_at, o.id) > (v_after_created_at, v_after_id)
        ORDER BY o.created_at, o.id
        LIMIT greatest(coalesce(p_limit, 100), 0)
    ) AS e
    -- The unique index on active jobs allows one of them at most.
    LEFT JOIN public.job_queue AS q
        ON q.idempotency_key = e.idempotency_key
       AND q.state IN ('queued', 'leased', 'in_progress', 'retry_waiting');

    RETURN jsonb_build_object(
        'refused', false,
        'route_code', v_route.route_code,
        'event_domain', v_route.event_domain,
        'job_kind', v_job_kind,
        'substrate_enabled', v_substrate_enabled,
        'cursor', jsonb_build_object(
            'worker_name', v_cursor.worker_name,
            'last_created_at', v_cursor.last_created_at,
            'last_event_id', v_cursor.last_event_id,
            'last_run_at', v_cursor.last_run_at
        ),
        'backlog', v_backlog,
        'listed_count', jsonb_array_length(v_would_enqueue),
        'truncated', v_backlog > jsonb_array_length(v_would_enqueue),
        'would_enqueue', v_would_enqueue
    );
END;
$function$;
