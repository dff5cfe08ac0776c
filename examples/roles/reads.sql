-- What it takes to plan: included by planner.sql and operator.sql, because an apply plans again, under its locks.
-- :reader is who.

-- Gates and markers, and what the marker's moment is bound to.
GRANT USAGE ON SCHEMA public TO :"reader";
GRANT SELECT ON public.dot_config, public.queue_heartbeat, public.iu_route_worker_cursor TO :"reader";

-- What invariants and the surface read. Without one of these the checks that read it are not judged, which blocks.
GRANT SELECT ON
    public.event_outbox, public.information_unit, public.iu_sql_event_route, public.iu_vector_sync_point,
    public.job_dead_letter, public.job_queue
TO :"reader";
GRANT pg_read_all_settings TO :"reader";    -- F01: the preloaded libraries
GRANT pg_read_all_stats TO :"reader";       -- no-unexpected-backend: what every server process is

-- What was applied last; drift is told from pending by it.
GRANT USAGE ON SCHEMA reconciler TO :"reader";
GRANT SELECT ON reconciler.entry TO :"reader";
