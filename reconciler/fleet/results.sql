-- What the rounds of a fleet saw, in a schema of its own. Never in a governed database's ledger.
CREATE SCHEMA reconciler_fleet;

-- One round over the fleet. targets: [{"name": ..., "labels": {...}}] in the order of the fleet's file.
CREATE TABLE reconciler_fleet.round (
    id text PRIMARY KEY,
    fleet text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    targets jsonb NOT NULL
);
CREATE INDEX round_of_fleet ON reconciler_fleet.round (fleet, started_at DESC);

-- One look at one target: the key is what makes it one for each round, whoever was killed and tried again.
CREATE TABLE reconciler_fleet.result (
    round text NOT NULL REFERENCES reconciler_fleet.round ON DELETE CASCADE,
    target text NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    worker text NOT NULL,
    body jsonb NOT NULL,
    PRIMARY KEY (round, target)
);
