-- What was there before the queue and belongs to others: the queue observes it and never writes it.
SET ROLE workflow_admin;

CREATE TABLE public.event_type_registry (
    event_domain text NOT NULL,
    event_type text NOT NULL,
    event_stream text NOT NULL,
    delivery_lane text NOT NULL,
    active boolean NOT NULL DEFAULT true,
    description text,
    created_at timestamp with time zone NOT NULL DEFAULT now(),
    PRIMARY KEY (event_domain, event_type),
    CONSTRAINT event_type_registry_domain_check CHECK (event_domain IN ('iu', 'knowledge', 'governance', 'system')),
    CONSTRAINT event_type_registry_type_check CHECK (event_type ~ '^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+$'),
    CONSTRAINT event_type_registry_stream_check CHECK (event_stream IN ('lifecycle', 'audit', 'sync')),
    CONSTRAINT event_type_registry_lane_check CHECK (delivery_lane IN ('outbox', 'digest', 'archive'))
);
COMMENT ON TABLE public.event_type_registry IS 'Event types that event_outbox accepts.';

INSERT INTO public.event_type_registry (event_domain, event_type, event_stream, delivery_lane, description, created_at)
VALUES
    ('iu', 'iu.created', 'lifecycle', 'outbox', 'An information unit was created.', '2026-03-02 08:00:00+00'),
    ('iu', 'iu.version_applied', 'lifecycle', 'outbox', 'A new version of a unit is in force.', '2026-03-02 08:00:00+00'),
    ('iu', 'iu.marked', 'lifecycle', 'outbox', 'A unit was marked for cutting.', '2026-03-02 08:00:00+00'),
    ('iu', 'iu.cut', 'lifecycle', 'outbox', 'A marked unit was cut.', '2026-03-02 08:00:00+00'),
    ('iu', 'iu.vector_synced', 'sync', 'digest', 'A sync point was confirmed.', '2026-03-02 08:00:00+00'),
    ('knowledge', 'knowledge.page_published', 'lifecycle', 'outbox', 'A page of the hub was published.', '2026-03-02 08:00:00+00'),
    ('governance', 'governance.law_enacted', 'audit', 'archive', 'A law was enacted.', '2026-03-02 08:00:00+00'),
    ('system', 'system.health_reported', 'audit', 'digest', 'A health report came in.', '2026-03-02 08:00:00+00');

-- Sixteen columns, twelve of them NOT NULL, exactly nine CHECKs. (information_schema counts both as
-- CHECK constraints and says 21; pg_constraint with contype = 'c' says nine.)
CREATE TABLE public.event_outbox (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    event_domain text NOT NULL,
    event_type text NOT NULL,
    event_stream text NOT NULL,
    delivery_lane text NOT NULL DEFAULT 'outbox',
    event_severity text NOT NULL DEFAULT 'info',
    event_subject_table text,
    event_subject_ref text,
    canonical_address text,
    actor_ref text NOT NULL,
    source_system text NOT NULL,
    correlation_id uuid,
    payload_classification text NOT NULL DEFAULT 'reference_only',
    safe_payload jsonb NOT NULL DEFAULT '{}',
    occurred_at timestamp with time zone NOT NULL DEFAULT now(),
    created_at timestamp with time zone NOT NULL DEFAULT now(),
    CONSTRAINT event_outbox_event_domain_check CHECK (event_domain IN ('iu', 'knowledge', 'governance', 'system')),
    CONSTRAINT event_outbox_event_stream_check CHECK (event_stream IN ('lifecycle', 'audit', 'sync')),
    CONSTRAINT event_outbox_delivery_lane_check CHECK (delivery_lane IN ('outbox', 'digest', 'archive')),
    CONSTRAINT event_outbox_event_severity_check CHECK (event_severity IN ('debug', 'info', 'notice', 'warning', 'error')),
    CONSTRAINT event_outbox_event_subject_check CHECK ((event_subject_table IS NULL) = (event_subject_ref IS NULL)),
    CONSTRAINT event_outbox_actor_ref_check CHECK (btrim(actor_ref) <> ''),
    CONSTRAINT event_outbox_source_system_check CHECK (btrim(source_system) <> ''),
    CONSTRAINT event_outbox_payload_classification_check CHECK (
        payload_classification IN ('public', 'internal', 'reference_only')
    ),
    CONSTRAINT event_outbox_safe_payload_check CHECK (
        jsonb_typeof(safe_payload) = 'object' AND NOT (safe_payload ?| ARRAY[
            'body', 'content', 'raw', 'vector', 'embedding', 'secret', 'token', 'password', 'ssn', 'personal_data'
        ])
    )
);
COMMENT ON TABLE public.event_outbox IS 'Events of the whole system, in the order in which consumers read them.';

-- The keyset of the consumers.
CREATE INDEX event_outbox_created_at_id_idx ON public.event_outbox (created_at, id);

CREATE FUNCTION public.fn_event_outbox_type_validate()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp
AS $function$
BEGIN
    IF NOT EXISTS (
        SELECT FROM public.event_type_registry AS r
        WHERE r.event_domain = NEW.event_domain AND r.event_type = NEW.event_type AND r.active
    ) THEN
        RAISE EXCEPTION 'event type % of domain % is not registered', NEW.event_type, NEW.event_domain
            USING ERRCODE = 'foreign_key_violation';
    END IF;
    RETURN NEW;
END;
$function$;
REVOKE ALL ON FUNCTION public.fn_event_outbox_type_validate() FROM PUBLIC;

CREATE TRIGGER trg_event_outbox_type_validate
    BEFORE INSERT OR UPDATE OF event_domain, event_type ON public.event_outbox
    FOR EACH ROW EXECUTE FUNCTION public.fn_event_outbox_type_validate();

-- The route worker is a function that someone calls, not a daemon; this row is its only trace. It stands
-- where it stopped on 22 May, which nothing in the queue could see.
CREATE TABLE public.iu_route_worker_cursor (
    worker_name text PRIMARY KEY,
    event_domain text NOT NULL,
    last_created_at timestamp with time zone,
    last_event_id uuid,
    last_run_at timestamp with time zone,
    runs_total bigint NOT NULL DEFAULT 0,
    events_seen_total bigint NOT NULL DEFAULT 0,
    events_routed_total bigint NOT NULL DEFAULT 0,
    last_run_summary jsonb NOT NULL DEFAULT '{}'
);
COMMENT ON TABLE public.iu_route_worker_cursor IS 'How far the route worker read event_outbox, and when it ran last.';

INSERT INTO public.iu_route_worker_cursor VALUES (
    'iu_outbound_default', 'iu', '2026-05-22 11:31:40.102334+00', md5('event_outbox:1')::uuid,
    '2026-05-22 11:31:41.928657+00', 2816, 40213, 40213,
    '{"batch": 7, "dry_run": true, "routed": 7, "seen": 7}'
);

CREATE TABLE public.iu_sql_event_route (
    route_code text PRIMARY KEY,
    event_domain text NOT NULL,
    event_type text NOT NULL,
    target_kind text NOT NULL,
    enabled boolean NOT NULL DEFAULT false,
    dry_run boolean NOT NULL DEFAULT true,
    description text,
    FOREIGN KEY (event_domain, event_type) REFERENCES public.event_type_registry (event_domain, event_type),
    CONSTRAINT iu_sql_event_route_dry_run_check CHECK (enabled = false OR dry_run = true),
    CONSTRAINT iu_sql_event_route_target_kind_check CHECK (target_kind IN ('job', 'digest', 'none'))
);
COMMENT ON TABLE public.iu_sql_event_route IS 'Which event would become what; an enabled route is a dry run.';

INSERT INTO public.iu_sql_event_route VALUES
    ('iu_version_applied_default', 'iu', 'iu.version_applied', 'job', true, true, 'Pilot route.'),
    ('iu_marked_default', 'iu', 'iu.marked', 'none', false, true, NULL),
    ('iu_cut_default', 'iu', 'iu.cut', 'none', false, true, NULL);

CREATE TABLE public.information_unit (
    unit_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    canonical_address text NOT NULL UNIQUE,
    title text NOT NULL,
    unit_kind text NOT NULL,
    lifecycle_state text NOT NULL DEFAULT 'draft',
    content_digest text NOT NULL,
    version integer NOT NULL DEFAULT 1,
    owner_ref text NOT NULL,
    created_at timestamp with time zone NOT NULL DEFAULT now(),
    updated_at timestamp with time zone NOT NULL DEFAULT now(),
    CONSTRAINT information_unit_unit_kind_check CHECK (unit_kind IN ('law', 'report', 'guide', 'note')),
    CONSTRAINT information_unit_lifecycle_state_check CHECK (
        lifecycle_state IN ('draft', 'marked', 'cut', 'enacted', 'retired')
    ),
    CONSTRAINT information_unit_version_check CHECK (version >= 1)
);
COMMENT ON TABLE public.information_unit IS 'Units of knowledge, by canonical address.';

CREATE TABLE public.iu_vector_sync_point (
    sync_point_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    unit_id uuid NOT NULL REFERENCES public.information_unit (unit_id),
    collection_name text NOT NULL,
    point_ref uuid NOT NULL,
    content_digest text NOT NULL,
    synced_at timestamp with time zone NOT NULL,
    UNIQUE (collection_name, point_ref)
);
COMMENT ON TABLE public.iu_vector_sync_point IS 'Which version of a unit the vector store holds.';

-- A handful of rows to see and to compare. The real numbers come with the magnitudes.
INSERT INTO public.information_unit (
    unit_id, canonical_address, title, unit_kind, lifecycle_state, content_digest, owner_ref, created_at, updated_at
)
SELECT md5('information_unit:' || n)::uuid, 'knowledge/dev/laws/unit-' || n, 'Unit ' || n,
       (ARRAY['law', 'report', 'guide', 'note'])[1 + n % 4], 'enacted', md5('content:' || n), 'workflow_admin',
       timestamptz '2026-03-10 09:00:00+00' + n * interval '7 hours',
       timestamptz '2026-03-10 09:00:00+00' + n * interval '7 hours'
FROM generate_series(1, 5) AS n;

INSERT INTO public.iu_vector_sync_point (unit_id, collection_name, point_ref, content_digest, synced_at)
SELECT md5('information_unit:' || n)::uuid, 'iu_default', md5('point:' || n)::uuid, md5('content:' || n),
       timestamptz '2026-03-10 10:00:00+00' + n * interval '7 hours'
FROM generate_series(1, 4) AS n;

INSERT INTO public.event_outbox (
    id, event_domain, event_type, event_stream, event_subject_table, event_subject_ref, canonical_address, actor_ref,
    source_system, safe_payload, occurred_at, created_at
)
SELECT md5('event_outbox:' || n)::uuid, 'iu', 'iu.version_applied', 'lifecycle', 'information_unit',
       md5('information_unit:' || n)::uuid::text, 'knowledge/dev/laws/unit-' || n, 'agent:editor', 'directus',
       jsonb_build_object('version', n), timestamptz '2026-05-22 11:31:40.102334+00' - (n - 1) * interval '13 seconds',
       timestamptz '2026-05-22 11:31:40.102334+00' - (n - 1) * interval '13 seconds'
FROM generate_series(1, 5) AS n;

GRANT SELECT ON public.event_type_registry, public.event_outbox, public.iu_route_worker_cursor,
    public.iu_sql_event_route, public.information_unit, public.iu_vector_sync_point TO reader;

RESET ROLE;
