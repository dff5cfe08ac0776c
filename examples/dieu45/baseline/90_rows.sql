-- Magnitudes, second half: 175 information units, 152 sync points and 133,784 events, written through the
-- tables' own constraints and trigger. Everything is computed from the row number: two loads are equal.
SET ROLE workflow_admin;

INSERT INTO public.information_unit (
    unit_id, canonical_address, title, unit_kind, lifecycle_state, content_digest, owner_ref, created_at, updated_at
)
SELECT md5('information_unit:' || n)::uuid, 'knowledge/dev/laws/unit-' || n, 'Unit ' || n,
       (ARRAY['law', 'report', 'guide', 'note'])[1 + n % 4], 'enacted', md5('content:' || n), 'workflow_admin',
       timestamptz '2026-03-10 09:00:00+00' + n * interval '7 hours',
       timestamptz '2026-03-10 09:00:00+00' + n * interval '7 hours'
FROM generate_series((SELECT count(*) + 1 FROM public.information_unit), 175) AS n;

INSERT INTO public.iu_vector_sync_point (unit_id, collection_name, point_ref, content_digest, synced_at)
SELECT md5('information_unit:' || n)::uuid, 'iu_default', md5('point:' || n)::uuid, md5('content:' || n),
       timestamptz '2026-03-10 10:00:00+00' + n * interval '7 hours'
FROM generate_series((SELECT count(*) + 1 FROM public.iu_vector_sync_point), 152) AS n;

-- One event every 13 seconds up to the moment at which the route worker fell silent, then 5,000 more that
-- nobody has read since.
INSERT INTO public.event_outbox (
    id, event_domain, event_type, event_stream, delivery_lane, event_subject_table, event_subject_ref,
    canonical_address, actor_ref, source_system, safe_payload, occurred_at, created_at
)
SELECT md5('event_outbox:' || event.n)::uuid, r.event_domain, r.event_type, r.event_stream, r.delivery_lane,
       'information_unit', md5('information_unit:' || 1 + event.n % 175)::uuid::text,
       'knowledge/dev/laws/unit-' || 1 + event.n % 175, 'agent:editor', 'directus',
       jsonb_build_object('version', event.n), event.at, event.at
FROM (
    SELECT n,
           timestamptz '2026-05-22 11:31:40.102334+00'
               + CASE WHEN n <= 128784 THEN (1 - n) * interval '13 seconds'
                      ELSE (n - 128784) * interval '69 seconds'
                 END AS at
    FROM generate_series((SELECT count(*) + 1 FROM public.event_outbox), 133784) AS n
) AS event
JOIN (
    SELECT row_number() OVER (ORDER BY t.event_domain, t.event_type) - 1 AS position, t.*
    FROM public.event_type_registry AS t
) AS r ON r.position = event.n % 8
ORDER BY event.n;

ANALYZE public.information_unit, public.iu_vector_sync_point, public.event_outbox;

RESET ROLE;
