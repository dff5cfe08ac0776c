#!/usr/bin/env bash
# The README's walk, shortened, on a private PostgreSQL. Cleans up after itself.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
sandbox=(--data "$work/server")
finish() {
  status=$?
  reconciler sandbox down "${sandbox[@]}" >/dev/null 2>&1 || true
  rm -rf "$work"
  exit "$status"
}
trap finish EXIT
# The server of a sandbox that root starts runs as another user, which must be able to reach its files.
chmod 755 "$work"

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
sql() {
  printf '$ psql: %s\n' "$1"
  python - "$1" <<'PY'
import os, sys, psycopg
with psycopg.connect(os.environ["RECONCILER_DSN"], autocommit=True) as conn:
    cursor = conn.execute(sys.argv[1])
    for row in cursor.fetchall() if cursor.description else []:
        print("  " + ", ".join(f"{column.name}={value}" for column, value in zip(cursor.description, row)))
PY
}
files=(-s examples/feature-flags/state)

step "A shop, and what should be true of its flags"
RECONCILER_DSN=$(reconciler sandbox up examples/feature-flags/baseline "${sandbox[@]}" | tail -n 1)
export RECONCILER_DSN
run reconciler plan "${files[@]}" --out "$work/express.plan" | grep -v '^      '

step "Approved and applied"
run reconciler approve "$work/express.plan" --as on-call --reason "Express checkout" \
  --accept arms_gate --accept grants_execute --accept moves_from_safe --accept security_definer
run reconciler apply "$work/express.plan" --initialize
sql "SELECT name, val FROM \"Shop Control\".app_settings WHERE name LIKE 'checkout.%' ORDER BY name"
run reconciler plan "${files[@]}" --detailed-exitcode | tail -n 2

step "Somebody opens the procedure to everybody; drift sees it and exits 2"
sql 'GRANT EXECUTE ON PROCEDURE "Shop Control".purge_carts(integer, bigint) TO PUBLIC'
status=0
run reconciler drift "${files[@]}" || status=$?
printf 'exit code %s\n' "$status"
test "$status" -eq 2

step "Repaired as anything else is changed: planned, approved, applied"
run reconciler plan "${files[@]}" --out "$work/repair.plan" | grep -v '^      '
run reconciler approve "$work/repair.plan" --as on-call --reason "Nobody but on-call purges" --accept overwrites_drift
run reconciler apply "$work/repair.plan"
run reconciler drift "${files[@]}" | tail -n 2

step "Done; the server and its files are removed"
