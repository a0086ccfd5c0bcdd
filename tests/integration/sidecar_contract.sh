#!/bin/sh
# `kvloom sidecar` and the commands that look into it, as a user starts them: sh sidecar_contract.sh BUILD
set -eu
kvloom=$1/kvloom
place=$(mktemp -d)
trap '[ "$pid" -eq 0 ] || kill "$pid" 2>/dev/null || true; rm -rf "$place"' EXIT
pid=0
fail() {
    echo "FAILED: $*" >&2
    exit 1
}
# refuses STATUS TEXT COMMAND...: it ends with that status and says that on standard error.
refuses() {
    wanted=$1 text=$2
    shift 2
    status=0
    "$@" >/dev/null 2>"$place/said" || status=$?
    [ "$status" -eq "$wanted" ] || fail "$* ended with $status, not $wanted"
    grep -q -- "$text" "$place/said" || fail "$* did not say '$text'"
}

head -c 32 /dev/zero >"$place/key"
public=$("$kvloom" keygen "$place/pair")
[ ${#public} -eq 40 ] || fail "keygen printed '$public'"
refuses 1 EXISTS "$kvloom" keygen "$place/pair"

common="--socket $place/s.sock --key-file $place/key --model m"
# S8: nothing beyond the loopback without keys and a list.
refuses 1 keygen "$kvloom" sidecar $common --listen tcp://0.0.0.0:9555
refuses 1 allow-list "$kvloom" sidecar $common --listen tcp://0.0.0.0:9555 --curve-key "$place/pair"
refuses 1 "model or fingerprint" "$kvloom" sidecar --socket "$place/s.sock"
refuses 1 "no sidecar" "$kvloom" stat --socket "$place/none.sock" --model m
chmod 644 "$place/pair"
refuses 1 "chmod 600" "$kvloom" sidecar $common --curve-key "$place/pair"
chmod 600 "$place/pair"

# Configuration: the file, then the environment, then the command line.
cat >"$place/config" <<END
name: from-file
model: m
lease: 5s
tenants:
  - name: a
    socket: $place/a.sock
    key-file: $place/key
    memory: 32MiB
  - name: b
    socket: $place/b.sock
    key-file: $place/key
END
"$kvloom" sidecar --config "$place/config" --check-config | grep -q "2 tenants" || fail "check-config"
KVLOOM_LEASE=6s KVLOOM_NAME=from-env "$kvloom" sidecar --name from-line --config "$place/config" \
    --print-config >"$place/printed"
grep -q 'name: "from-line"' "$place/printed" || fail "the command line does not win"
grep -q 'lease: "6s"' "$place/printed" || fail "the environment does not win over the file"
grep -q 'memory: "32MiB"' "$place/printed" || fail "the file is not used"
"$kvloom" sidecar --config "$place/printed" --check-config >/dev/null || fail "its own print is refused"
# wrong LINE TEXT: a file with that line is refused in words.
wrong() {
    { cat "$place/config" && echo "$1"; } >"$place/wrong"
    refuses 1 "$2" "$kvloom" sidecar --config "$place/wrong" --check-config
}
wrong "wrkers: 2" "line 12: there is no key 'wrkers'; the nearest is 'workers'"
wrong "    memroy: 1GiB" "line 12: there is no key 'memroy'; the nearest is 'memory'"
wrong "    memory: 8 gigs" "8 gigs"
wrong "    memory: 0" "more than nothing"
wrong "    durable: perhaps" "true or false"
wrong "workers: 1000" "1 to 16"
wrong "name: again" "a second value for name"
wrong "peers: none" "a list is wanted"
wrong "  : : [" "line 12"
KVLOOM_CONFIG=$place/config "$kvloom" sidecar 2>/dev/null &
pid=$!
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ ! -S "$place/b.sock" ] || break
    sleep 0.1
done
"$kvloom" stat --socket "$place/a.sock" --model m | grep -q "32 MiB" || fail "tenant a is not there"
"$kvloom" stat --socket "$place/b.sock" --model m >/dev/null || fail "tenant b is not there"
kill -TERM $pid
wait $pid || fail "SIGTERM ended it with $?"
pid=0

echo "$public default read me" >"$place/allow"
KVLOOM_LOG=info "$kvloom" sidecar $common --store "$place/store" --disk 64MiB --memory 16MiB \
    --listen "tcp://127.0.0.1:$((10000 + $$ % 20000))" --curve-key "$place/pair" \
    --allow-list "$place/allow" 2>"$place/log" &
pid=$!
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ ! -S "$place/s.sock" ] || break
    sleep 0.1
done
[ "$(stat -c %a "$place/s.sock")" = 600 ] || fail "the socket is open to others"
"$kvloom" stat --socket "$place/s.sock" --model m --json | grep -q '"memory_bytes_max": 16777216' ||
    fail "stat does not show the cap"
[ "$("$kvloom" ls --socket "$place/s.sock" --model m --json | tr -d '\n')" = "[]" ] ||
    fail "an empty store is not listed as empty"
refuses 1 FOREIGN "$kvloom" ls --socket "$place/s.sock" --model other
refuses 1 NOT_FOUND "$kvloom" rm --socket "$place/s.sock" --model m "$(printf '%064d' 1)"
refuses 2 "no id" "$kvloom" rm --socket "$place/s.sock" --model m xyz
refuses 1 "another process listens" "$kvloom" sidecar $common
# said TEXT: it stands in the log within ten seconds.
said() {
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        if grep -q -- "$1" "$place/log"; then return; fi
        sleep 0.5
    done
    cat "$place/log" >&2
    fail "the log does not say '$1'"
}
# The list is read again on SIGHUP; one with a mistake changes nothing.
kill -HUP $pid
said "event=allow_list_read.*keys=1"
echo "nonsense" >"$place/allow"
kill -HUP $pid
said "event=allow_list_kept"
kill -TERM $pid
wait $pid || fail "SIGTERM ended it with $?"
[ ! -e "$place/s.sock" ] || fail "the socket file was left"
pid=0
echo "sidecar: starts, refuses, answers, reloads and stops as it says"
