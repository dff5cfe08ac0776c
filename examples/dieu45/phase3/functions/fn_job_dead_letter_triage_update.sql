CREATE FUNCTION public.fn_job_dead_letter_triage_update(
    p_dead_letter_id uuid,
    p_triage_status text,
    p_actor text,
    p_triage_note text DEFAULT NULL
)
RETURNS jsonb
LANGUAGE plpgsql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    v_from text;
BEGIN
    -- No gate: triage is bookkeeping about a letter. It never touches job_queue, so nothing runs because
    -- of it; manual_replay too is only a wish.
    IF coalesce(btrim(p_actor), '') = '' THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'actor_required');
    END IF;
    -- The vocabulary of the table's CHECK, five words. A NULL is none of them.
    IF coalesce(p_triage_status, '') NOT IN ('pending', 'acknowledged', 'manual_replay', 'escalated', 'closed') THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'invalid_triage_status');
    END IF;

    -- The last writer wins, but each one is told what it replaced; that needs the row's lock.
    SELECT d.triage_status
    INTO v_from
    FROM public.job_dead_letter AS d
    WHERE d.dead_letter_id = p_dead_letter_id
    FOR UPDATE;
    IF NOT FOUND THEN
        RETURN jsonb_build_object('refused', true, 'reason', 'not_found');
    END IF;

    UPDATE public.job_dead_letter AS d
    SET triage_status = p_triage_status,
        triaged_at = clock_timestamp(),
        triaged_by = p_actor,
        triage_note = p_triage_note
    WHERE d.dead_letter_id = p_dead_letter_id;

    RETURN jsonb_build_object('refused', false, 'from', v_from, 'to', p_triage_status, 'requeued', false);
END;
$function$;
