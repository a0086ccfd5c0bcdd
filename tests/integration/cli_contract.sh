#!/bin/sh
# The command line as a user meets it, without a model: what is printed where, and exit statuses:
# 0 done, 1 failed, 2 wrong use.
#     sh tests/integration/cli_contract.sh build/release
set -eu

kvloom=${1:-build/release}/kvloom
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
n_failed=0

# expect STATUS PATTERN STREAM COMMAND...: the status, and a line on the stream (out or err) that
# matches; the other stream must be empty.
expect() {
    wanted=$1 pattern=$2 stream=$3
    shift 3
    status=0
    "$@" >"$folder/out" 2>"$folder/err" </dev/null || status=$?
    other=err
    [ "$stream" = out ] || other=out
    if [ "$status" -ne "$wanted" ]; then
        echo "status $status, should be $wanted: $*"
    elif ! grep -Eq "$pattern" "$folder/$stream"; then
        echo "no line like '$pattern' on std$stream: $*"
    elif [ -s "$folder/$other" ]; then
        echo "std$other should be empty: $*"
    else
        return 0
    fi
    n_failed=$((n_failed + 1))
    sed 's/^/    /' "$folder/out" "$folder/err" | head -n 5
}

expect 0 '^kvloom [0-9]+\.[0-9]+\.[0-9]+$' out "$kvloom" version
expect 0 '^kvloom [0-9]+\.[0-9]+\.[0-9]+$' out "$kvloom" --version
expect 0 '^Usage: kvloom COMMAND' out "$kvloom" --help
expect 2 '^Usage: kvloom COMMAND' err "$kvloom"
expect 2 "no command 'frobnicate'" err "$kvloom" frobnicate
expect 0 'smollm2-135m' out "$kvloom" model list
for command in demo serve generate tokenize logits model explain status bench batch chat get put doctor sidecar; do
    expect 0 "^Usage: kvloom $command" out "$kvloom" "$command" --help
done

# The manual pages are made of what --help says, so it is enough that they are there.
for page in kvloom kvloom-demo kvloom-serve kvloom-generate; do
    expect 0 '^\.SH DESCRIPTION' out cat "$(dirname "$kvloom")/man/$page.1"
done

# Not there: the name, and what to do about it.
expect 1 'nowhere.gguf' err "$kvloom" generate --model "$folder/nowhere.gguf" --prompt x
expect 1 'model list' err "$kvloom" generate --model "$folder/nowhere.gguf" --prompt x
expect 1 'model pull smollm2-135m' err env XDG_CACHE_HOME="$folder" "$kvloom" generate --prompt x

# There, but no model: refused with what was found, where, and what would do.
: >"$folder/empty.gguf"
expect 1 'at byte 0' err "$kvloom" generate --model "$folder/empty.gguf" --prompt x
printf 'not a model, only a line of text that is long enough to be read as a header\n' \
    >"$folder/text.gguf"
expect 1 'not a GGUF file' err "$kvloom" logits --model "$folder/text.gguf" \
    --tokens-file "$folder/text.gguf" --out "$folder/logits"
printf 'GGUF\003\000\000\000\377\377\377\377\377\377\377\177\001\000\000\000\000\000\000\000' \
    >"$folder/huge.gguf"
expect 1 '9223372036854775807 at byte 8; must be at most' err "$kvloom" tokenize --model "$folder/huge.gguf" "$folder/text.gguf"

[ "$n_failed" -eq 0 ] && echo "cli_contract: all as promised"
