CREATE SCHEMA "My ""Schema";
GRANT USAGE, CREATE ON SCHEMA "My ""Schema" TO golden_owner;
CREATE TABLE "My ""Schema"."select" ("order" text PRIMARY KEY, "a.b" text, "from" text);
INSERT INTO "My ""Schema"."select" VALUES ('app[1].x y''z"', 'off', 'd'), ('app[1].loose', '1', 'd'), ('app1.x', '1', 'd');
CREATE FUNCTION "My ""Schema"."Select""" ("table" text) RETURNS text LANGUAGE sql AS 'SELECT 1::text';
ALTER FUNCTION "My ""Schema"."Select""" (text) OWNER TO golden_owner;
CREATE FUNCTION "My ""Schema".fn_loose() RETURNS text LANGUAGE sql AS 'SELECT 1::text';
