-- Phase 1's three tables. Their functions and the trigger of job_queue follow in 40, their views in 50.
SET ROLE workflow_admin;

CREATE TABLE public.job_queue (
    job_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    job_kind text NOT NULL,
    state text NOT NULL DEFAULT 'queued',
    source_ref text,
    target_ref text,
    payload_ref text,
    payload_json jsonb NOT NULL DEFAULT '{}',
    priority integer NOT NULL DEFAULT 100,
    scheduled_at timestamp with time zone NOT NULL DEFAULT now(),
    picked_at timestamp with time zone,
    finished_at timestamp with time zone,
    lease_owner text,
    lease_until timestamp with time zone,
    attempts integer NOT NULL DEFAULT 0,
    max_attempts integer NOT NULL DEFAULT 5,
    idempotency_key text NOT NULL,
    actor text NOT NULL,
    run_id uuid,
    last_error text,
    created_at timestamp with time zone NOT NULL DEFAULT now(),
    updated_at timestamp with time zone NOT NULL DEFAULT now(),
    CONSTRAINT job_queue_job_kind_check CHECK (btrim(job_kind) <> ''),
    CONSTRAINT job_queue_state_check CHECK (state IN (
        'queued', 'leased', 'in_progress', 'succeeded', 'failed', 'retry_waiting', 'dead_letter', 'cancelled', 'cleaned'
    )),
    -- Top level and exact spelling only: the backstop of fn_job_enqueue, which looks at every depth.
    CONSTRAINT job_queue_payload_safe_check CHECK (NOT (payload_json ?| ARRAY[
        'body', 'content', 'raw', 'vector', 'embedding', 'secret', 'token', 'password', 'ssn', 'personal_data'
    ])),
    CONSTRAINT job_queue_attempts_check CHECK (attempts >= 0),
    CONSTRAINT job_queue_max_attempts_check CHECK (max_attempts >= 1),
    CONSTRAINT job_queue_priority_check CHECK (priority >= 0),
    CONSTRAINT job_queue_lease_check CHECK ((lease_owner IS NULL) = (lease_until IS NULL)),
    CONSTRAINT job_queue_finished_check CHECK (
        state NOT IN ('succeeded', 'failed', 'dead_letter', 'cancelled', 'cleaned') OR finished_at IS NOT NULL
    ),
    CONSTRAINT job_queue_actor_check CHECK (btrim(actor) <> '')
);
COMMENT ON TABLE public.job_queue IS 'Jobs; written only by fn_job_*.';

-- At most one active job per key; a key is free again when its job has ended.
CREATE UNIQUE INDEX job_queue_idempotency_key_active_idx ON public.job_queue (idempotency_key)
    WHERE state IN ('queued', 'leased', 'in_progress', 'retry_waiting');
CREATE INDEX job_queue_claim_idx ON public.job_queue (priority, scheduled_at, job_id)
    WHERE state IN ('queued', 'retry_waiting');
CREATE INDEX job_queue_lease_until_idx ON public.job_queue (lease_until)
    WHERE state IN ('leased', 'in_progress');

-- No foreign key to job_queue: a letter outlives the pruning of its job.
CREATE TABLE public.job_dead_letter (
    dead_letter_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    job_id uuid NOT NULL UNIQUE,
    job_kind text NOT NULL,
    idempotency_key text NOT NULL,
    source_ref text,
    target_ref text,
    payload_ref text,
    payload_json jsonb NOT NULL DEFAULT '{}',
    priority integer NOT NULL DEFAULT 100,
    actor text NOT NULL,
    run_id uuid,
    attempts integer NOT NULL,
    max_attempts integer NOT NULL,
    last_error text,
    last_lease_owner text,
    dead_letter_reason text NOT NULL,
    dead_lettered_by text NOT NULL,
    dead_lettered_at timestamp with time zone NOT NULL DEFAULT now(),
    triage_status text NOT NULL DEFAULT 'pending',
    triaged_at timestamp with time zone,
    triaged_by text,
    triage_note text,
    CONSTRAINT job_dead_letter_payload_safe_check CHECK (NOT (payload_json ?| ARRAY[
        'body', 'content', 'raw', 'vector', 'embedding', 'secret', 'token', 'password', 'ssn', 'personal_data'
    ])),
    CONSTRAINT job_dead_letter_reason_check CHECK (
        dead_letter_reason IN ('max_attempts', 'non_retryable', 'lease_expired_max_attempts')
    ),
    CONSTRAINT job_dead_letter_triage_status_check CHECK (
        triage_status IN ('pending', 'acknowledged', 'manual_replay', 'escalated', 'closed')
    )
);
COMMENT ON TABLE public.job_dead_letter IS 'Jobs that gave up, one letter each, and what people decided about them.';

-- One row per executor, never deleted by the system. ticks_total = 0 means that it never ticked itself.
CREATE TABLE public.queue_heartbeat (
    executor_name text PRIMARY KEY,
    executor_kind text NOT NULL,
    last_tick_at timestamp with time zone NOT NULL,
    last_tick_status text NOT NULL DEFAULT 'ok',
    ticks_total bigint NOT NULL DEFAULT 0,
    current_job_id uuid,
    lease_owner text,
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamp with time zone NOT NULL DEFAULT now(),
    CONSTRAINT queue_heartbeat_executor_kind_check CHECK (executor_kind IN (
        'DOT', 'Agent', 'Hermes', 'Codex', 'PG_worker', 'external_worker', 'future_Kestra_adapter'
    )),
    CONSTRAINT queue_heartbeat_last_tick_status_check CHECK (last_tick_status IN ('ok', 'warn', 'error')),
    CONSTRAINT queue_heartbeat_ticks_total_check CHECK (ticks_total >= 0)
);
COMMENT ON TABLE public.queue_heartbeat IS 'The last sign of life of every executor.';

GRANT SELECT ON public.job_queue, public.job_dead_letter, public.queue_heartbeat TO operator, worker, reader;

RESET ROLE;
