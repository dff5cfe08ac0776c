#!/usr/bin/env bash
# The plan of a pull request, for action.yml: comment.md and change.plan in $OUT; code, outcome, digest and has-changes.
#
# Exit codes of reconciler: 0 nothing to do, 2 changes, 3 blocked; these have a comment. Anything else is nobody's plan:
# this script ends with it.
set -euo pipefail

words=(plan --state "$STATE" --format markdown --detailed-exitcode --no-color)
if [ -n "${TARGET:-}" ]; then words+=(--target "$TARGET"); fi
if [ -n "${LIVE:-}" ]; then words+=(--live "$LIVE"); unset RECONCILER_DSN; fi
if [ -n "${TEMPLATE:-}" ]; then words+=(--template "$TEMPLATE"); fi
if [ -n "${RUN_URL:-}" ]; then words+=(--artefact "$RUN_URL"); fi

mkdir -p "$OUT"
rm -f "$OUT/change.plan" "$OUT/comment.md"
code=0
reconciler "${words[@]}" --out "$OUT/change.plan" > "$OUT/comment.md" || code=$?
case "$code" in
  0) outcome=no_changes has_changes=false ;;
  2) outcome=changes has_changes=true ;;
  3) outcome=violated has_changes=true ;;
  *)
    echo "::error title=No plan::reconciler plan ended with $code; see what it said above."
    exit "$code"
    ;;
esac
digest=
if [ "$code" = 2 ]; then digest=$(jq -er .effect_digest "$OUT/change.plan"); fi
{
  echo "code=$code"
  echo "outcome=$outcome"
  echo "digest=$digest"
  echo "has-changes=$has_changes"
} >> "$GITHUB_OUTPUT"
cat "$OUT/comment.md" >> "$GITHUB_STEP_SUMMARY"
