-- The five names under which operators mark and cut information units. They stand beside the queue and
-- no phase of it may touch them.
SET ROLE workflow_admin;

CREATE FUNCTION public.fn_iu_op_mark_file(
    p_canonical_address text,
    p_title text,
    p_attributes jsonb,
    p_unit_kind text,
    p_content_digest text,
    p_owner_ref text,
    p_actor text,
    p_note text DEFAULT NULL
)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    v_unit_id uuid;
BEGIN
    INSERT INTO public.information_unit AS u (
        canonical_address, title, unit_kind, lifecycle_state, content_digest, owner_ref
    )
    VALUES (p_canonical_address, p_title, p_unit_kind, 'marked', p_content_digest, p_owner_ref)
    ON CONFLICT (canonical_address) DO NOTHING
    RETURNING u.unit_id INTO v_unit_id;
    RETURN jsonb_build_object('marked', v_unit_id IS NOT NULL, 'unit_id', v_unit_id, 'actor', p_actor,
                              'attributes', coalesce(p_attributes, '{}'), 'note', p_note);
END;
$function$;

CREATE FUNCTION public.fn_iu_op_verify_mark(
    p_unit_id uuid,
    p_strict boolean DEFAULT true,
    p_expected_digest text DEFAULT NULL,
    p_actor text DEFAULT NULL,
    p_note text DEFAULT NULL
)
RETURNS jsonb
LANGUAGE sql
STABLE
SET search_path = pg_catalog, public, pg_temp
AS $function$
    SELECT jsonb_build_object(
        'verified', count(*) = 1 AND (NOT coalesce(p_strict, true) OR bool_and(u.content_digest = p_expected_digest)),
        'unit_id', p_unit_id, 'actor', p_actor, 'note', p_note
    )
    FROM public.information_unit AS u
    WHERE u.unit_id = p_unit_id AND u.lifecycle_state = 'marked'
$function$;

CREATE FUNCTION public.fn_iu_op_cut(
    p_unit_id uuid,
    p_apply boolean DEFAULT false,
    p_actor text DEFAULT NULL,
    p_keep_draft boolean DEFAULT true
)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    v_found boolean;
BEGIN
    IF coalesce(p_apply, false) THEN
        UPDATE public.information_unit AS u
        SET lifecycle_state = 'cut', version = u.version + 1, updated_at = clock_timestamp()
        WHERE u.unit_id = p_unit_id AND u.lifecycle_state = 'marked';
        v_found := FOUND;
    ELSE
        v_found := EXISTS (
            SELECT FROM public.information_unit AS u WHERE u.unit_id = p_unit_id AND u.lifecycle_state = 'marked'
        );
    END IF;
    RETURN jsonb_build_object('cut', v_found AND coalesce(p_apply, false), 'would_cut', v_found, 'unit_id', p_unit_id,
                              'actor', p_actor, 'keep_draft', p_keep_draft);
END;
$function$;

CREATE FUNCTION public.fn_iu_op_verify_cut(p_unit_id uuid, p_actor text DEFAULT NULL)
RETURNS jsonb
LANGUAGE sql
STABLE
SET search_path = pg_catalog, public, pg_temp
AS $function$
    SELECT jsonb_build_object('verified', count(*) = 1, 'unit_id', p_unit_id, 'actor', p_actor)
    FROM public.information_unit AS u
    WHERE u.unit_id = p_unit_id AND u.lifecycle_state = 'cut'
$function$;

CREATE FUNCTION public.fn_iu_op_cleanup_dry_run(p_limit integer DEFAULT 100, p_actor text DEFAULT NULL)
RETURNS jsonb
LANGUAGE sql
STABLE
SET search_path = pg_catalog, public, pg_temp
AS $function$
    SELECT jsonb_build_object('would_clean', count(*), 'actor', p_actor)
    FROM (
        SELECT FROM public.information_unit AS u
        WHERE u.lifecycle_state = 'retired'
        LIMIT greatest(coalesce(p_limit, 100), 0)
    ) AS retired
$function$;

DO $$
DECLARE
    v_function regprocedure;
BEGIN
    FOR v_function IN
        SELECT p.oid FROM pg_catalog.pg_proc AS p
        WHERE p.pronamespace = 'public'::regnamespace AND p.proname ~ '^fn_iu_op_'
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', v_function);
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO operator', v_function);
    END LOOP;
END;
$$;

RESET ROLE;
