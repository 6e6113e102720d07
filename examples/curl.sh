#!/usr/bin/env bash
# One job with nothing but curl, jq and sha256sum:
#
#   examples/curl.sh REQUEST.json FOLDER
#
# The service comes from SLIMTRIM_URL, the key from SLIMTRIM_API_KEY. To go on with downloads that were cut, see client/README.md.
set -euo pipefail

request=$1 folder=$2
service=${SLIMTRIM_URL:-http://127.0.0.1:8000}

# By a file, so that the key is not in the list of processes.
key() { [ -z "${SLIMTRIM_API_KEY:-}" ] || printf 'header = "Authorization: Bearer %s"\n' "$SLIMTRIM_API_KEY"; }
# --retry waits as long as Retry-After says.
fetch() { curl --silent --show-error --fail-with-body --retry 5 --retry-connrefused "$@"; }
# A refusal ends the script, after its detail and every pointer.
call() {
    local answer
    answer=$(fetch --config <(key) "$@") || {
        jq -r '"\(.code): \(.detail)", (.errors[]? | "  \(.pointer): \(.detail)")' <<< "$answer" >&2
        return 1
    }
    printf '%s\n' "$answer"
}
post() { call --request POST --header 'Content-Type: application/json' --data-binary @"$request" "$@"; }

echo "== what would happen"
post "$service/v1/plans" | jq -r '"\(.bytes_before) bytes would be \(.bytes_after)", (.warnings[] | "warning: \(.message)")'

echo "== one job, however often this request is sent"
job=$(post --header "Idempotency-Key: $(date +%s)-$$-$RANDOM" "$service/v1/jobs" | jq -r .id)
echo "$job"

# Each answer comes when the job ends, or after a minute.
status=queued
while [[ $status == queued || $status == running || $status == cancelling ]]; do
    state=$(call --header 'Prefer: wait=60' "$service/v1/jobs/$job")
    status=$(jq -r .status <<< "$state")
    jq -r '"\(.status) \(.stage // "") \(.progress.fraction * 100 | floor) %"' <<< "$state"
done
if [ "$status" != succeeded ]; then
    jq -r '.status_reason // {} | "\(.code): \(.message)"' <<< "$state" >&2
    exit 1
fi

echo "== what was lost, the worst first"
call "$service/v1/jobs/$job/report" | jq -r '.lost[]'

echo "== the files"
mkdir -p "$folder"
sums=$(mktemp)
trap 'rm -f "$sums" "$sums.tsv"' EXIT
# Links need no key, may lead to another host, and are good for a quarter of an hour.
call "$service/v1/jobs/$job/artifact" | jq -r '.files[] | [.sha256, .path, .url] | @tsv' > "$sums.tsv"
while IFS=$'\t' read -r sha256 path url; do
    case "/$path/" in
        //* | */../* | *\\*) echo "the manifest names $path, which leads out of $folder" >&2; exit 1 ;;
    esac
    case $url in /*) url=$service$url ;; esac
    fetch --location --create-dirs --output "$folder/$path" "$url"
    printf '%s  %s\n' "$sha256" "$path" >> "$sums"
done < "$sums.tsv"
(cd "$folder" && sha256sum --check --strict "$sums")
