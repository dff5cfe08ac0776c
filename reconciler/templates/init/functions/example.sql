CREATE FUNCTION public.fn_sessions_purge(p_limit integer DEFAULT 500)
RETURNS jsonb
LANGUAGE plpgsql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    v_deleted bigint;
BEGIN
    -- Only the word true opens the gate: a missing row and a spelling mistake keep it shut.
    IF NOT EXISTS (
        SELECT FROM public.app_settings AS s
        WHERE s.name = 'sessions.purge_enabled' AND s.value = 'true'
    ) THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'sessions.purge_enabled=false', 'deleted', 0);
    END IF;

    WITH over AS (
        SELECT s.session_id
        FROM public.app_sessions AS s
        WHERE s.expires_at < now()
        ORDER BY s.expires_at
        LIMIT p_limit
        FOR UPDATE SKIP LOCKED
    )
    DELETE FROM public.app_sessions AS s
    USING over AS o
    WHERE s.session_id = o.session_id;
    GET DIAGNOSTICS v_deleted = ROW_COUNT;

    RETURN jsonb_build_object('refused', false, 'deleted', v_deleted);
END
$function$;
