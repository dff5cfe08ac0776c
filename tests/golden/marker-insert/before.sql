CREATE TABLE public.workers (
    name text PRIMARY KEY, kind text NOT NULL DEFAULT 'none', beats bigint NOT NULL DEFAULT 0, last_beat timestamptz
);
CREATE TABLE public.cursors (name text PRIMARY KEY, at timestamptz);
INSERT INTO public.cursors VALUES ('mail', '2026-05-22 11:31:41.928657+00'), ('other', NULL);
INSERT INTO public.workers VALUES ('stranger', 'x', 1, NULL), ('passive', 'changed', 0, '2020-01-01');
