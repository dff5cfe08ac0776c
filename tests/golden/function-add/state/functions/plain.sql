create or replace function public.fn_plain() returns void language sql as 'SELECT 1; SELECT ''$function$''';
