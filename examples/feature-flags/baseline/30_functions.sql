SET ROLE "shop-admin";
SET search_path = "Shop Control";

-- As it grew: everybody may call it, it runs as its caller, who then needs the table, and it finds the table by
-- whatever search_path that caller has.
CREATE FUNCTION "Shop Control".flag_is_on(p_name text)
RETURNS boolean
LANGUAGE sql
STABLE
AS $function$
    SELECT s.val = 'true' FROM app_settings AS s WHERE s.name = p_name
$function$;

GRANT SELECT ON "Shop Control".app_settings TO storefront;

RESET search_path;
RESET ROLE;
