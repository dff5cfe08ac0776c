#!/bin/sh
# One look for cron and systemd: nothing is said when all is well; otherwise a line that names what to do, and the report.
#
#   drift.sh [OPTIONS OF reconciler drift]        for example: drift.sh -s state -t production
#
# The exit code is that of `reconciler drift`: 0 as applied, 2 drift, 3 a rule is violated or cannot be judged, 4 refused
# (another database, or somebody went around the ledger), 1 nobody could look (this also after DRIFT_TIMEOUT).
#
#   DRIFT_TIMEOUT  seconds for the look; 300
#   DRIFT_REPORT   file that holds the last report, a clean one too: its age tells that looks happen; none
#   DRIFT_HOOK     program for all that is not well, called with the exit code and a word (drift, violated, refused,
#                  error), the report on standard input: a pager, a ticket; none
set -u

limit=${DRIFT_TIMEOUT:-300}
file=${DRIFT_REPORT:-}
hook=${DRIFT_HOOK:-}

work=$(mktemp -d) || exit 1
child=
trap 'rm -rf "$work"' EXIT
trap 'kill "$child" 2>/dev/null; exit 1' HUP INT TERM

# In the background, so that a signal to this script reaches the look at once.
timeout -k 10 "$limit" reconciler drift --no-color "$@" >"$work/report" 2>&1 &
child=$!
wait "$child"
code=$?

# For the journal: how urgent each line is (sd-daemon(3)). Cron mails what is printed.
level() {
    if [ -n "${JOURNAL_STREAM:-}" ]; then printf '<%s>' "$1"; fi
}

case $code in
    0) word=clean ;;
    2) word=drift say="$(level 4)Drift: somebody changed what was applied. Find out who, then put it back or accept it." ;;
    3) word=violated say="$(level 2)Violated: what must hold does not, or nobody can tell. Look now; no apply goes on before." ;;
    4) word=refused say="$(level 2)Refused: not the database that the files mean, or its ledger is not what it was. Look now." ;;
    124 | 137) word=error code=1 say="$(level 3)Not checked: no answer within $limit seconds." ;;
    *) word=error code=1 say="$(level 3)Not checked: whether anything drifted is not known." ;;
esac

if [ -n "$file" ]; then
    # In the place of the old one, whole; whoever may read the directory may read it.
    { cat "$work/report" >"$file.new" && chmod 0644 "$file.new" && mv -f "$file.new" "$file"; } || {
        echo "The report could not be written to $file." >&2
        [ "$code" -ne 0 ] || code=1
    }
fi

[ "$word" = clean ] && exit "$code"

echo "$say"
cat "$work/report"
if [ -n "$hook" ]; then
    "$hook" "$code" "$word" <"$work/report" || echo "$hook failed: nobody was told by it." >&2
fi
exit "$code"
