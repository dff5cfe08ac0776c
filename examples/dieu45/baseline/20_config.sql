-- The configuration table, and the eight keys that Phase 1 left behind: everything off.
SET ROLE workflow_admin;

CREATE TABLE public.dot_config (
    key text PRIMARY KEY,
    value text NOT NULL,
    description text,
    updated_at timestamp with time zone NOT NULL DEFAULT now()
);
COMMENT ON TABLE public.dot_config IS 'Configuration of the whole system; keys queue.* are the gates of the queue.';

INSERT INTO public.dot_config (key, value, description, updated_at) VALUES
    ('queue.heartbeat.enabled', 'false', 'Master gate of the heartbeat protocol.', '2026-05-25 20:14:07.318402+00'),
    ('queue.heartbeat.stale_threshold_seconds', '300', 'An executor that is silent for longer counts as stale.', '2026-05-25 20:14:07.318402+00'),
    ('queue.job_substrate.enabled', 'false', 'Master gate of every function that writes jobs.', '2026-05-25 20:14:07.318402+00'),
    ('queue.lease.duration_sec', '300', 'How long a claimed job belongs to its worker.', '2026-05-25 20:14:07.318402+00'),
    ('queue.notify.enabled', 'false', 'Master gate of notifications.', '2026-05-25 20:14:07.318402+00'),
    ('queue.retry.backoff_base_sec', '10', 'Wait before the first retry; it doubles with each further attempt.', '2026-05-25 20:14:07.318402+00'),
    ('queue.retry.max_attempts_default', '5', 'Attempts of a job that names no number of its own.', '2026-05-25 20:14:07.318402+00'),
    ('queue.worker.enabled', 'false', 'Master gate of worker processes; no function reads it.', '2026-05-25 20:14:07.318402+00');

GRANT SELECT ON public.dot_config TO operator, worker, reader;

RESET ROLE;
