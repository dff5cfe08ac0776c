CREATE PROCEDURE public.pr_old(p integer) LANGUAGE sql AS 'SELECT 2';
