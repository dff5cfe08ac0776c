-- Phase 1's three views. The time is read once, in a CTE: the scans then compare with a constant.
SET ROLE workflow_admin;

-- One row per executor and at least one row always, so that the counters can be read when no executor
-- ever reported. Up to 300 s is fresh, up to 600 s a warning, beyond that stale.
CREATE VIEW public.v_queue_health AS
WITH clock AS MATERIALIZED (
    SELECT clock_timestamp() AS at
), executor AS MATERIALIZED (
    SELECT h.executor_name,
           h.executor_kind,
           h.last_tick_at,
           h.last_tick_status,
           h.ticks_total,
           h.ticks_total = 0 AS passive,
           floor(extract(epoch FROM clock.at - h.last_tick_at))::bigint AS age_seconds,
           CASE WHEN h.last_tick_at >= clock.at - interval '300 seconds' THEN 'fresh'
                WHEN h.last_tick_at >= clock.at - interval '600 seconds' THEN 'warning'
                ELSE 'stale'
           END AS status_hint
    FROM public.queue_heartbeat AS h
    CROSS JOIN clock
), counter AS (
    SELECT count(*) AS executors_total,
           count(*) FILTER (WHERE e.status_hint = 'fresh') AS executors_fresh,
           count(*) FILTER (WHERE e.status_hint = 'warning') AS executors_warning,
           count(*) FILTER (WHERE e.status_hint = 'stale') AS executors_stale,
           (
               SELECT count(*) FROM public.job_queue AS q
               WHERE q.state IN ('leased', 'in_progress') AND q.lease_until < (SELECT clock.at FROM clock)
           ) AS leases_stale,
           (
               SELECT count(*) FROM public.job_queue AS q WHERE q.state IN ('queued', 'retry_waiting')
           ) AS jobs_waiting,
           (
               SELECT count(*) FROM public.job_dead_letter AS d WHERE d.triage_status = 'pending'
           ) AS dead_letters_pending
    FROM executor AS e
)
SELECT counter.executors_total,
       counter.executors_fresh,
       counter.executors_warning,
       counter.executors_stale,
       counter.leases_stale,
       counter.jobs_waiting,
       counter.dead_letters_pending,
       executor.executor_name,
       executor.executor_kind,
       executor.last_tick_at,
       executor.last_tick_status,
       executor.ticks_total,
       executor.passive,
       executor.age_seconds,
       executor.status_hint
FROM counter
LEFT JOIN executor ON true;
COMMENT ON VIEW public.v_queue_health IS 'One row per executor, the counters of the queue repeated in each.';

CREATE VIEW public.v_job_queue_backlog AS
WITH clock AS MATERIALIZED (
    SELECT clock_timestamp() AS at
)
SELECT q.job_kind,
       q.state,
       count(*) AS jobs,
       count(*) FILTER (WHERE q.scheduled_at <= (SELECT clock.at FROM clock)) AS jobs_due,
       min(q.scheduled_at) AS oldest_scheduled_at,
       max(q.attempts) AS attempts_max
FROM public.job_queue AS q
WHERE q.state IN ('queued', 'leased', 'in_progress', 'retry_waiting')
GROUP BY q.job_kind, q.state;
COMMENT ON VIEW public.v_job_queue_backlog IS 'Jobs that are not finished, by kind and state.';

CREATE VIEW public.v_job_dead_letter_summary AS
SELECT d.job_kind,
       d.dead_letter_reason,
       d.triage_status,
       count(*) AS letters,
       min(d.dead_lettered_at) AS oldest_dead_lettered_at,
       max(d.dead_lettered_at) AS newest_dead_lettered_at
FROM public.job_dead_letter AS d
GROUP BY d.job_kind, d.dead_letter_reason, d.triage_status;
COMMENT ON VIEW public.v_job_dead_letter_summary IS 'Dead letters, by kind, reason and triage status.';

GRANT SELECT ON public.v_queue_health, public.v_job_queue_backlog, public.v_job_dead_letter_summary
    TO operator, worker, reader;

RESET ROLE;
