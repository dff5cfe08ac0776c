CREATE TABLE public.workers (
    name text PRIMARY KEY, kind text NOT NULL DEFAULT 'none', beats bigint NOT NULL DEFAULT 0, last_beat timestamptz
);
CREATE TABLE public.cursors (name text PRIMARY KEY, at timestamptz);
INSERT INTO public.cursors VALUES ('mail', '2026-05-22 11:31:41.928657+00'), ('other', NULL);
CREATE FUNCTION public.register(p_name text, p_kind text, p_at timestamptz, p_note text DEFAULT NULL) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    INSERT INTO public.workers (name, kind, last_beat) VALUES (p_name, p_kind, p_at);
    RETURN jsonb_build_object('refused', false);
END
$$;
