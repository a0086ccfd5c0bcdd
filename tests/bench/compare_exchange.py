"""Segments between two processes of one machine, KVLoom's sidecar and Mooncake Store in turns:

    python3 tests/bench/compare_exchange.py BUILD [ROUNDS]

The peer is installed into an environment of its own under $XDG_CACHE_HOME/kvloom/peers the first time; it needs
the system's libibverbs1 and librdmacm1, and is left out where they are missing. Both put a new segment and
get it into touched memory of the caller, 1, 16 and 64 MiB: Mooncake over tcp loopback from a second process that
holds the memory, KVLoom from its sidecar, in memory alone. Prints one JSON object: medians and p99 in ms, resident
memory of the servers after it, start-up time, installed size. One turn of each is not counted.
"""
import ctypes as c
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import kill_campaign

CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "kvloom", "peers")
PACKAGES = ["mooncake-transfer-engine-non-cuda==0.3.13", "nvidia-cuda-runtime-cu12"]
SIZES_MIB = [1, 16, 64]
TOKEN_BYTES = 32 << 10  # 32 layers, 4 heads of 64, float16
MASTER = "127.0.0.1:50061"
HOLDER = f"""
import sys
from mooncake.store import MooncakeDistributedStore
s = MooncakeDistributedStore()
print("mooncake", s.setup("127.0.0.1:50071", "P2PHANDSHAKE", 3 << 30, 128 << 20, "tcp", "", "{MASTER}"), flush=True)
sys.stdin.read()
"""
READER = f"""
import ctypes, sys, time
from mooncake.store import MooncakeDistributedStore
s = MooncakeDistributedStore()
most = 64 << 20
print("mooncake", s.setup("127.0.0.1:50072", "P2PHANDSHAKE", 0, 256 << 20, "tcp", "", "{MASTER}"), flush=True)
room = ctypes.create_string_buffer(most)
assert s.register_buffer(ctypes.addressof(room), most) == 0
data = bytes(range(256)) * (most // 256)
for line in sys.stdin:
    what, key, size = line.split()
    part = data[:int(size)]
    begin = time.perf_counter()
    done = s.put(key, part) if what == "put" else s.get_into(key, ctypes.addressof(room), int(size))
    took = time.perf_counter() - begin
    good = done == 0 if what == "put" else done == int(size) and room.raw[:64] == part[:64]
    print("mooncake", took if good else -1.0, flush=True)
"""


def folder_mib(path):
    return sum(os.lstat(os.path.join(at, name)).st_size
               for at, _, names in os.walk(path) for name in names) / 2**20


def install():
    """The environment of the peer; None where it cannot run here."""
    place = os.path.join(CACHE, "mooncake")
    python = os.path.join(place, "bin", "python")
    if not os.path.exists(os.path.join(place, "bin", "mooncake_master")):
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True,
                       stdout=sys.stderr)
    library = subprocess.run([python, "-c", "import nvidia.cuda_runtime as n; print(n.__path__[0])"],
                             capture_output=True, text=True, check=True).stdout.strip()
    environment = dict(os.environ, MC_LOG_LEVEL="ERROR")
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(
        [os.path.join(library, "lib"), os.environ.get("LD_LIBRARY_PATH", "")])
    if subprocess.run([python, "-c", "import mooncake.store"], env=environment, check=False,
                      stdout=sys.stderr).returncode != 0:
        return None
    return place, python, environment


class Mooncake:
    def __init__(self, place, python, environment):
        self.installed_mib = folder_mib(place)
        self.processes = []
        begin = time.monotonic()
        quiet = {"env": environment, "stderr": subprocess.DEVNULL}
        self.processes.append(subprocess.Popen(
            [os.path.join(place, "bin", "mooncake_master"), "--rpc_port=50061", "--metrics_port=50062"],
            stdout=subprocess.DEVNULL, **quiet))
        time.sleep(1)  # it says nothing that could be waited for; not counted
        asleep = 1
        for source in (HOLDER, READER):
            self.processes.append(subprocess.Popen(
                [python, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                **quiet))
            assert self.said() == 0, "Mooncake does not start"
            if source is HOLDER:
                self.start_s = time.monotonic() - begin - asleep

    def said(self):
        for line in self.processes[-1].stdout:
            if line.startswith("mooncake "):
                return float(line.split()[1])
        raise SystemExit("Mooncake ended")

    def time(self, what, number, size):
        reader = self.processes[-1]
        reader.stdin.write(f"{what} k{number} {size}\n")
        reader.stdin.flush()
        return self.said()

    def resident_mib(self):
        return sum(kill_campaign.resident_mib(p.pid) for p in self.processes[:2])

    def stop(self):
        for process in reversed(self.processes):
            process.kill()
            process.wait()


class Kvloom:
    def __init__(self, build):
        self.installed_mib = sum(os.path.getsize(os.path.join(build, name)) for name in
                                 ("kvloom", "libkvloom.so")) / 2**20
        self.place = tempfile.mkdtemp(prefix="kvloom-compare-")
        with open(self.place + "/key", "wb") as file:
            file.write(bytes(32))
        begin = time.monotonic()
        self.sidecar = subprocess.Popen(
            [os.path.join(build, "kvloom"), "sidecar", "--socket", self.place + "/s.sock", "--key-file",
             self.place + "/key", "--model", "kill", "--memory", "3GiB"], stderr=subprocess.DEVNULL)
        kill_campaign.LAYERS, kill_campaign.HEADS, kill_campaign.DIM = 32, 4, 64
        self.client = kill_campaign.Client(os.path.join(build, "libkvloom.so"), self.place + "/s.sock")
        self.start_s = time.monotonic() - begin
        self.idle_mib = kill_campaign.resident_mib(self.sidecar.pid)
        self.room = c.create_string_buffer(max(SIZES_MIB) << 20)
        self.data = bytes(range(256)) * (len(self.room) // 256)

    def time(self, what, number, size):
        n = size // TOKEN_BYTES
        tokens = (c.c_uint32 * n)(*range(number * 10000, number * 10000 + n))
        key = kill_campaign.Key(tokens=tokens, n_tokens=n)
        layer = size // kill_campaign.LAYERS
        layers = (c.c_char_p * kill_campaign.LAYERS)(
            *[self.data[i * layer:(i + 1) * layer] for i in range(kill_campaign.LAYERS)])
        lib, client, error = self.client.lib, self.client.client, c.byref(self.client.error)
        begin = time.perf_counter()
        if what == "put":
            status = lib.kvloom_put(client, c.byref(key), layers, 0, error)
        else:
            status = lib.kvloom_get_into(client, c.byref(key), 0, self.room, c.c_size_t(size), None, error)
        took = time.perf_counter() - begin
        good = status == 0 and (what == "put" or self.room.raw[:64] == self.data[:64])
        return took if good else -1.0

    def resident_mib(self):
        return kill_campaign.resident_mib(self.sidecar.pid)

    def stop(self):
        self.sidecar.kill()
        self.sidecar.wait()
        shutil.rmtree(self.place)


def main():
    build = os.path.abspath(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 15
    peer = install()
    if peer is None:
        print("Mooncake cannot run here: install libibverbs1 and librdmacm1", file=sys.stderr)
        return 77
    sides = {"kvloom": Kvloom(build), "mooncake": Mooncake(*peer)}
    rows, figures, number = [], {}, 0
    try:
        for size_mib in SIZES_MIB:
            times = {(name, what): [] for name in sides for what in ("put", "get")}
            for turn in range(rounds + 1):
                number += 1
                for name in list(sides)[::1 if turn % 2 == 0 else -1]:
                    for what in ("put", "get"):
                        took = sides[name].time(what, number, size_mib << 20)
                        assert took > 0, f"{name}: {what} of {size_mib} MiB failed"
                        if turn > 0:
                            times[name, what].append(took * 1e3)
            for (name, what), taken in times.items():
                taken.sort()
                rows.append({"what": f"{name}, {what}, {size_mib} MiB",
                             "p50_ms": round(statistics.median(taken), 3),
                             "p99_ms": round(taken[min(len(taken) - 1, len(taken) * 99 // 100)], 3)})
            for what in ("put", "get"):
                figures[f"{what}_{size_mib}m_vs_mooncake"] = round(
                    statistics.median(times["mooncake", what]) / statistics.median(times["kvloom", what]), 2)
        for name, side in sides.items():
            rows.append({"what": f"{name}: server", "resident_mib": round(side.resident_mib(), 1),
                         "start_ms": round(side.start_s * 1e3, 1),
                         "installed_mib": round(side.installed_mib, 1)})
    finally:
        for side in sides.values():
            side.stop()
    print(json.dumps({"name": "exchange-peers", "figures": figures, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
