CREATE TABLE public.settings (name text PRIMARY KEY, value text);
INSERT INTO public.settings VALUES ('app.enabled', 'true'), ('app.blank', ' ');
CREATE SCHEMA cron;
CREATE VIEW cron."Jobs" AS SELECT 1;
CREATE TABLE public."Jobs" ();
