GRANT USAGE, CREATE ON SCHEMA public TO golden_owner;
CREATE PROCEDURE public.pr_old(p integer) LANGUAGE sql AS 'SELECT 1';
ALTER PROCEDURE public.pr_old(integer) OWNER TO golden_owner;
