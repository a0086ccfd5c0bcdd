#!/bin/sh
# `kvloom sidecar` and the commands that look into it, as a user starts them: sh sidecar_contract.sh BUILD
set -eu
kvloom=$1/kvloom
tests=$(cd "$(dirname "$0")/.." && pwd)
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

# A file goes in and comes out: the blocks, the tokens and the shape are the same, the id is the sidecar's.
example=$tests/golden/segment/example_f16.kvseg
refuses 1 NOT_FOUND "$kvloom" put --socket "$place/s.sock" "$place/none.kvseg"
cp "$example" "$place/hurt.kvseg"
printf '\377' | dd of="$place/hurt.kvseg" bs=1 seek=$(($(stat -c %s "$example") - 70)) conv=notrunc 2>/dev/null
refuses 1 DAMAGED "$kvloom" put --socket "$place/s.sock" --model m "$place/hurt.kvseg"
refuses 1 "with --home" "$kvloom" put --socket "$place/s.sock" --model m "$example"
printf '1\n2\n3\n' >"$place/home"
put="$kvloom put --socket $place/s.sock --home $place/home"
refuses 1 FOREIGN $put "$example"
id=$($put --model m "$example")
[ "$("$kvloom" get --socket "$place/s.sock" --model m -o "$place/out.kvseg" "$id")" = "$place/out.kvseg" ] ||
    fail "get does not name its file"
"$kvloom" ls --socket "$place/s.sock" --model m | grep -q "$id" || fail "what was put is not listed"
"$kvloom" rm --socket "$place/s.sock" --model m "$id"
[ "$($put --model m "$place/out.kvseg")" = "$id" ] || fail "what was got is not what was put"
echo 4 >>"$place/home"
[ "$($put --model m "$place/out.kvseg")" != "$id" ] || fail "another home has the same id"
refuses 1 "no peer" "$kvloom" get --socket "$place/s.sock" --model m "$(printf '%064d' 1)"
refuses 2 "one id" "$kvloom" get --socket "$place/s.sock" --model m

# A trace of what is asked, and what each policy would have made of it.
"$kvloom" trace record --socket "$place/s.sock" --model m --for 2s "$place/trace" 2>"$place/recorded" &
recorder=$!
sleep 0.5
"$kvloom" get --socket "$place/s.sock" --model m -o "$place/out.kvseg" "$id" >/dev/null
refuses 1 "no peer" "$kvloom" get --socket "$place/s.sock" --model m "$(printf '%064d' 1)"
wait $recorder || fail "trace record ended with $?"
grep -q "^2 accesses, 0 lost" "$place/recorded" || fail "trace record says $(cat "$place/recorded")"
grep -q " default $id [0-9]* hit$" "$place/trace" || fail "the trace is $(cat "$place/trace")"
"$kvloom" trace replay "$place/trace" | grep -q "^best: " || fail "replay names no policy"
"$kvloom" trace replay --policy lru --json "$place/trace" | grep -q '"gets":2' || fail "replay counts wrong"
refuses 1 "no trace\|does not begin" "$kvloom" trace replay "$example"
refuses 2 "auto, slru" "$kvloom" trace replay --policy fifo "$place/trace"
"$kvloom" sidecar $common --policy auto --trace "$place/trace" --check-config >/dev/null || fail "auto is refused"
refuses 1 "lru, slru or s3fifo" "$kvloom" sidecar $common --policy fifo --check-config
refuses 1 "auto, where a trace" "$kvloom" sidecar $common --trace "$place/trace" --check-config

# doctor: what runs, what would run, and what would not.
cat >"$place/sick" <<END
model: m
listen: tcp://127.0.0.1:1
curve-key: $place/pair
allow-list: $place/allow
tenants:
  - name: a
    socket: $place/s.sock
    key-file: $place/key
    store: $place/store
    memory: 1MiB
    disk: 1MiB
END
chmod 600 "$place/key"
doctor() {
    status=0
    "$kvloom" doctor --config "$place/sick" "$@" >"$place/said" || status=$?
}
tells() {
    grep -q -- "$1" "$place/said" || fail "doctor does not tell '$1': $(cat "$place/said")"
}
doctor
tells "^ok    socket .*somebody listens"
tells "^ok    database .*in use"
tells "^ok    allow-list .*1 keys"
tells "^ok    curve-key"
tells "^ok    lmdb .*LMDB 0"
doctor --json
python3 -c "import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
assert all(line['finding'] in ('ok', 'warn', 'FAIL') for line in lines) and len(lines) > 8" "$place/said" ||
    fail "doctor --json is no JSON"
chmod 644 "$place/key" "$place/pair"
doctor
tells "^warn  key .*mode 0644"
tells "^FAIL  curve-key"
tells "chmod 600"
[ "$status" -eq 1 ] || fail "doctor ended with $status"
chmod 600 "$place/key" "$place/pair"
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
# Nobody has the database open now: its pages are looked at, and nothing is changed.
echo "$public a read me" >"$place/allow"
sed -i 's/^listen:.*/listen: ipc:\/\/\/tmp\/x/' "$place/sick"
doctor
[ "$status" -eq 0 ] || fail "doctor ended with $status: $(cat "$place/said")"
tells "^ok    database .*every page is sound"
tells "^ok    socket .*is free"
before=$(stat -c %s "$place/store/data.mdb")
dd if=/dev/urandom of="$place/store/data.mdb" bs=4096 seek=1 count=3 conv=notrunc 2>/dev/null
doctor
tells "^warn  database"
[ "$(stat -c %s "$place/store/data.mdb")" = "$before" ] || fail "doctor changed the database"
echo "wrkers: 2" >>"$place/sick"
doctor
tells "^FAIL  configuration .*wrkers"
echo "sidecar: starts, refuses, answers, reloads and stops as it says"
