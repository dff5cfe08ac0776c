-- Magnitudes, first half: 271 tables, 55 views and 515 functions in public and 94 configuration keys, 8 of
-- them queue.*. Everything the queue needs is in the files before; what this one adds stands for the rest
-- of the system, so that totals are counted among neighbours. It adds what is missing by counting what
-- is there: extensions bring their own functions, and how many differs by server.
SET ROLE workflow_admin;

DO $$
DECLARE
    v_areas constant text[] := ARRAY[
        'agent', 'archive', 'audit', 'codex', 'directus', 'dot', 'governance', 'hermes', 'iu', 'knowledge', 'law',
        'registry', 'release', 'report', 'review', 'search', 'vector'
    ];
    v_nouns constant text[] := ARRAY[
        'assignment', 'attachment', 'baseline', 'citation', 'comment', 'dependency', 'digest', 'glossary_term',
        'item', 'metric', 'policy', 'relation', 'revision', 'setting', 'snapshot', 'tag'
    ];
    v_name text;
    v_filler text[] := ARRAY[]::text[];
BEGIN
    FOR v_name IN
        SELECT area.name || '_' || noun.name
        FROM unnest(v_nouns) WITH ORDINALITY AS noun (name, position)
        CROSS JOIN unnest(v_areas) WITH ORDINALITY AS area (name, position)
        ORDER BY noun.position, area.position
        LIMIT 271 - (
            SELECT count(*) FROM pg_catalog.pg_class AS c
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
        )
    LOOP
        EXECUTE format(
            'CREATE TABLE public.%I (
                id bigint PRIMARY KEY,
                code text NOT NULL,
                attributes jsonb NOT NULL DEFAULT ''{}'',
                created_at timestamp with time zone NOT NULL DEFAULT now()
            )', v_name
        );
        v_filler := v_filler || v_name;
    END LOOP;

    FOR v_name IN
        SELECT filler.name
        FROM unnest(v_filler) WITH ORDINALITY AS filler (name, position)
        ORDER BY filler.position
        LIMIT 55 - (
            SELECT count(*) FROM pg_catalog.pg_class AS c
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'v'
        )
    LOOP
        EXECUTE format(
            'CREATE VIEW public.%I AS SELECT t.id, t.code, t.created_at FROM public.%I AS t WHERE t.code <> ''''',
            'v_' || v_name, v_name
        );
    END LOOP;

    FOR v_name IN
        SELECT 'CREATE FUNCTION public.'
               || CASE verb.name
                      WHEN 'count' THEN format(
                          '%I() RETURNS bigint LANGUAGE sql STABLE AS $f$ SELECT count(*) FROM public.%I $f$',
                          'fn_' || filler.name || '_count', filler.name
                      )
                      WHEN 'code' THEN format(
                          '%I(p_id bigint) RETURNS text LANGUAGE sql STABLE AS $f$ SELECT t.code FROM public.%I AS t WHERE t.id = p_id $f$',
                          'fn_' || filler.name || '_code', filler.name
                      )
                  END
        FROM unnest(ARRAY['count', 'code']) WITH ORDINALITY AS verb (name, position)
        CROSS JOIN unnest(v_filler) WITH ORDINALITY AS filler (name, position)
        ORDER BY verb.position, filler.position
        LIMIT 515 - (SELECT count(*) FROM pg_catalog.pg_proc AS p WHERE p.pronamespace = 'public'::regnamespace)
    LOOP
        EXECUTE v_name;
    END LOOP;
END;
$$;

INSERT INTO public.dot_config (key, value, description, updated_at)
SELECT area.name || '.' || setting.name, setting.value, NULL, '2026-03-02 08:00:00+00'
FROM unnest(
    ARRAY['batch.size', 'cache.ttl_sec', 'export.enabled', 'import.enabled', 'log.level', 'page.size', 'retention.days', 'sync.enabled'],
    ARRAY['200', '900', 'false', 'true', 'info', '50', '365', 'true']
) WITH ORDINALITY AS setting (name, value, position)
CROSS JOIN unnest(
    ARRAY['agent', 'archive', 'codex', 'directus', 'hermes', 'iu', 'knowledge', 'law', 'report', 'search', 'vector']
) WITH ORDINALITY AS area (name, position)
ORDER BY setting.position, area.position
LIMIT 94 - (SELECT count(*) FROM public.dot_config);

RESET ROLE;
