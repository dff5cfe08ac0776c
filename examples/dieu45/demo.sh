#!/usr/bin/env bash
# The main job on a private PostgreSQL: plan, approve, apply, plan again, drift. Cleans up after itself.
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

step "A PostgreSQL with the database as it was before the change"
RECONCILER_DSN=$(reconciler sandbox up examples/dieu45/baseline "${sandbox[@]}" | tail -n 1)
export RECONCILER_DSN
sql "SELECT count(*) AS functions FROM pg_proc WHERE pronamespace = 'public'::regnamespace"

step "What would change (reads only)"
run reconciler plan -t sandbox --out "$work/phase2.plan" | grep -v '^      '

step "A person approves exactly these effects, each hazard by name, and signs for what no query can see"
run reconciler approve "$work/phase2.plan" --as operator --reason "Phase 2 of the queue" \
  --accept arms_gate --accept grants_execute --accept moves_from_safe --accept security_definer \
  --attest F02-no-worker-started --attest F07-no-qdrant --attest F10-start-here --attest F11-law-text

step "The proofs on a scratch copy, also the one that needs two sessions"
run reconciler prove -t sandbox --rehearse --out "$work/phase2.rehearsal.json" | tail -n 1

step "Applied in one transaction, committed only because the result is what was approved and every proof passes"
run reconciler apply "$work/phase2.plan" --initialize --rehearsal "$work/phase2.rehearsal.json" --evidence "$work/evidence"

step "The silent worker is visible now"
sql "SELECT executors_stale, executor_name, status_hint, passive FROM v_queue_health"

step "The same files again: nothing to do"
run reconciler plan -t sandbox --detailed-exitcode | tail -n 2

step "Somebody loosens a function and changes a gate by hand; drift sees both and exits 2"
sql "ALTER FUNCTION public.fn_job_reap_stale_leases_apply(text, integer) RESET search_path"
sql "UPDATE public.dot_config SET value = '1' WHERE key = 'queue.retry.backoff_base_sec'"
status=0
run reconciler drift -t sandbox || status=$?
printf 'exit code %s\n' "$status"
test "$status" -eq 2

step "Done; the server and its files are removed"
