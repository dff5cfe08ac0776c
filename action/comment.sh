#!/usr/bin/env bash
# One comment of the plan on its pull request, for action.yml: written anew in its place, found by its first line.
#
# Only a comment of $AUTHOR is ours: somebody else could copy the first line, and change the comment after it was read.
set -euo pipefail

most=65536
comments="$GITHUB_API_URL/repos/$GITHUB_REPOSITORY/issues/$NUMBER/comments"
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT

# The token goes by a file descriptor: the words of a process can be read by others.
ask() { # METHOD URL [FILE with the body]
  local more=()
  if [ $# -gt 2 ]; then more=(--data-binary "@$3"); fi
  curl --silent --show-error --max-time 60 --retry 3 --request "$1" --output "$answer" --write-out '%{http_code}' \
    --header @<(printf 'Authorization: Bearer %s\n' "$TOKEN") --header 'Accept: application/vnd.github+json' \
    --header 'X-GitHub-Api-Version: 2022-11-28' "${more[@]}" "$2"
}

refused() { # CODE what
  case "$1" in
    401 | 403 | 404)
      # A fork's token may only read. The plan stands in the summary of the run; that nobody may comment is no reason to fail.
      echo "::warning title=No comment::$2: the token may not ($1). Give the job 'pull-requests: write'; forks never have it. The plan is in the summary of this run."
      exit 0
      ;;
    422)
      echo "::error title=No comment::$2: GitHub did not take it: $(jq -r '.message // "no reason given"' "$answer")"
      exit 1
      ;;
    *)
      echo "::error title=No comment::$2: GitHub answered $1. Run the job again."
      exit 1
      ;;
  esac
}

marker=$(head -n 1 "$FILE")
case "$marker" in
  "<!-- reconciler plan "*" -->") ;;
  *)
    echo "::error title=No comment::$FILE does not begin with the marker of a plan; a template begins with {{ marker }}."
    exit 1
    ;;
esac
# Not by jq: 1.6 spoils letters of several bytes where its buffers end.
length=$(python3 -c 'import sys; print(len(open(sys.argv[1], encoding="utf-8").read()))' "$FILE")
if [ "$length" -gt "$most" ]; then
  echo "::error title=No comment::$FILE has $length characters, and a comment at most $most."
  exit 1
fi

found=
page=1
while [ -z "$found" ]; do
  code=$(ask GET "$comments?per_page=100&page=$page")
  if [ "$code" != 200 ]; then refused "$code" "Reading the comments"; fi
  found=$(jq -r --arg marker "$marker" --arg author "$AUTHOR" \
    'first(.[] | select(.user.login == $author and (.body | split("\n")[0] | rtrimstr("\r")) == $marker) | .url) // empty' "$answer")
  if [ "$(jq length "$answer")" -lt 100 ]; then break; fi
  page=$((page + 1))
done

body=$(mktemp)
trap 'rm -f "$answer" "$body"' EXIT
python3 -c 'import json, sys; print(json.dumps({"body": open(sys.argv[1], encoding="utf-8").read()}))' "$FILE" > "$body"
if [ -n "$found" ]; then
  code=$(ask PATCH "$found" "$body")
else
  code=$(ask POST "$comments" "$body")
fi
case "$code" in
  200 | 201) jq -r '"Comment: " + .html_url' "$answer" ;;
  *) refused "$code" "Writing the comment" ;;
esac
