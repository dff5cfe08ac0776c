CREATE SCHEMA cron;
CREATE TABLE cron.jobs (id integer);
UPDATE public.settings SET value = ' ';
