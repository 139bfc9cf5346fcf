#!/usr/bin/env bash
# Starts the given server binary with its embedded model on a free port, lets it write and fill in
# text while one watches, and stops it as an orchestrator would: SIGTERM, then wait for a clean exit.
set -euo pipefail

denoised=${1:?usage: demo.sh PATH-OF-DENOISED}
ready_seconds=60
drain_seconds=30
work=$(mktemp -d)
server=

cleanup() {
    if [[ -n $server ]] && kill -0 "$server" 2>/dev/null; then
        kill -KILL "$server"
        wait "$server" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "demo: $1; the server said:" >&2
    cat "$work/stdout" "$work/stderr" >&2
    exit 1
}

# Shows a command and runs it.
show() {
    local argument
    printf '\n$ denoised'
    for argument; do
        [[ $argument == *[!A-Za-z0-9:/._-]* ]] && argument="'$argument'"
        printf ' %s' "$argument"
    done
    printf '\n'
    "$denoised" "$@"
}

: >"$work/stdout" # here before the first look at it, whenever the server gets to run
"$denoised" serve --listen 127.0.0.1:0 >"$work/stdout" 2>"$work/stderr" &
server=$!

url=
for ((tenths = 0; tenths < ready_seconds * 10; tenths++)); do
    url=$(sed -n 's|^.*listening on \(http://[^ ]*\).*$|\1|p' "$work/stdout" | head -n 1)
    [[ -n $url ]] && break
    kill -0 "$server" 2>/dev/null || fail "the server ended before it was ready"
    sleep 0.1
done
[[ -n $url ]] || fail "the server was not ready after $ready_seconds s"
echo "the server listens on $url (process $server)"

show generate --server "$url" --live always --pace 60 --length 48 --seed 14 \
    "In the beginning"
show infill --server "$url" --live always --pace 60 --seed 2 \
    'He said to his brother, "Go[[12]]." Then they went[[6]] together.'
if [[ -r /proc/$server/status ]]; then
    printf '\npeak memory of the server: '
    awk '/^VmHWM:/ { printf "%.0f MiB\n", $2 / 1024 }' "/proc/$server/status"
fi

kill -TERM "$server"
for ((tenths = 0; tenths < drain_seconds * 10; tenths++)); do
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
done
kill -0 "$server" 2>/dev/null && fail "the server still ran $drain_seconds s after SIGTERM"
status=0
wait "$server" || status=$?
server=
((status == 0)) || fail "the server left with status $status after SIGTERM"
echo "the server drained and left cleanly"
cat <<END

try next:
  $denoised generate --seed 3 "My son,"         # on a terminal, watch it denoise
  $denoised infill "The king looked at[[6]] and asked, \"Who[[12]]?\""
  $denoised generate --num-samples 4 --json "Blessed"
  $denoised serve                               # then open http://127.0.0.1:50051/ in a browser
END
