SET ROLE "shop-admin";

-- The flags. A value is a JSON document of any shape: a word, a number, true, an object.
CREATE TABLE "Shop Control".app_settings (
    name text PRIMARY KEY,
    val jsonb NOT NULL,
    note text,
    "changedAt" timestamp with time zone NOT NULL DEFAULT now()
);

INSERT INTO "Shop Control".app_settings (name, val, note, "changedAt") VALUES
    ('checkout.express', 'false', 'Pay without an account.', '2026-02-11 09:30:00+00'),
    ('checkout.limits', '{"items": 20, "currency": "EUR"}', 'The largest cart.', '2025-10-02 14:05:00+00'),
    ('carts.purge', '"off"', 'Deletion of carts that nobody came back to.', '2025-06-20 08:00:00+00'),
    ('release.ring', '"canary"', 'Who sees the current release.', '2026-03-01 07:45:00+00'),
    ('theme', '{"accent": "#0b6e4f", "dark": true}', 'Belongs to the designers.', '2026-03-04 16:20:00+00');

-- Signs of life, one row for each service in each region.
CREATE TABLE "Shop Control"."Beacon" (
    service text NOT NULL,
    region text NOT NULL,
    seen timestamp with time zone NOT NULL,
    beats bigint NOT NULL DEFAULT 0,
    state text NOT NULL DEFAULT 'live' CHECK (state IN ('live', 'silent')),
    PRIMARY KEY (service, region)
);

-- What the nightly import leaves behind. It has no beacon, and has not run for a while.
CREATE TABLE "Shop Control".import_run (
    run_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    region text NOT NULL,
    finished_at timestamp with time zone NOT NULL
);
INSERT INTO "Shop Control".import_run (region, finished_at) VALUES
    ('eu-west', '2026-02-26 03:10:41.204+00'),
    ('eu-west', '2026-02-27 03:11:02.871+00'),
    ('eu-north', '2026-02-27 03:40:19.016+00');

CREATE TABLE "Shop Control".cart (
    cart_id bigint PRIMARY KEY,
    items integer NOT NULL CHECK (items > 0),
    touched_at timestamp with time zone NOT NULL
);
INSERT INTO "Shop Control".cart VALUES
    (1, 3, '2025-08-01 10:00:00+00'), (2, 1, '2025-09-15 12:00:00+00'), (3, 7, '2026-03-05 18:00:00+00');

RESET ROLE;
