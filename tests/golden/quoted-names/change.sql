DELETE FROM "My ""Schema"."select" WHERE "order" LIKE 'marker%';
ALTER FUNCTION "My ""Schema"."Select"""(text) RENAME TO "Gone";
