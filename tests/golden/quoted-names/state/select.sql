CREATE FUNCTION "My ""Schema"."Select"""("table" text) RETURNS text LANGUAGE sql
SET search_path = pg_catalog, "My ""Schema", pg_temp
AS 'SELECT 2::text';
