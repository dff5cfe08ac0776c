REVOKE EXECUTE ON FUNCTION public.fn_one(integer) FROM golden_caller;
GRANT EXECUTE ON FUNCTION public.fn_one(integer) TO golden_caller WITH GRANT OPTION;
COMMENT ON FUNCTION public.fn_one(integer) IS NULL;
