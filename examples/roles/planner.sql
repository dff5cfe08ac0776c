-- The planner: plan, drift and pin. It may read, nothing else.
\set reader planner
\ir reads.sql
