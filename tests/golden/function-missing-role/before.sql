GRANT USAGE, CREATE ON SCHEMA public TO golden_owner;
