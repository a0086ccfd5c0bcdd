"""Random SIGKILL of a sidecar and its clients under load: python3 tests/bench/kill_campaign.py BUILD [N] [SEED] [SECONDS]

Clients put segments whose every byte follows from their number, and get them again. N times (100), the
sidecar or a client is killed at a random moment and started again; SECONDS ends it earlier. Checked: what was
acknowledged as durable is there after each restart, no wrong byte is ever read, a restart takes less than a
second, and in the end no lease, client or descriptor is left, the memory of the last sidecar is within its
cap, and `kvloom doctor` finds every page of the database sound. Prints one JSON object. The acceptance is
10,000 kills, about 25 minutes on two cores, in one run or in several with other seeds.
"""
import ctypes as c
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

LAYERS, HEADS, DIM = 4, 2, 64
CLIENTS = 3
NUMBERS = 400


class Digest(c.Structure):
    _fields_ = [("bytes", c.c_uint8 * 32)]


class Shape(c.Structure):
    _fields_ = [("dtype", c.c_int), ("n_layers", c.c_uint32), ("n_kv_heads", c.c_uint32),
                ("head_dim", c.c_uint32), ("rotated_halves", c.c_uint32)]


class Options(c.Structure):
    _fields_ = [("socket", c.c_char_p), ("name", c.c_char_p), ("salt", c.c_char_p),
                ("fingerprint", Digest), ("shape", Shape), ("reserved", c.c_uint64 * 8)]


class Key(c.Structure):
    _fields_ = [("tokens", c.POINTER(c.c_uint32)), ("n_tokens", c.c_size_t),
                ("home", c.POINTER(c.c_uint32)), ("n_home", c.c_size_t),
                ("reserved", c.c_uint64 * 2)]


class Error(c.Structure):
    _fields_ = [("status", c.c_int), ("text", c.c_char * 512)]


class Stats(c.Structure):
    _fields_ = [(name, c.c_uint64) for name in
                ("memory_bytes", "memory_bytes_max", "disk_bytes", "disk_bytes_max", "n_containers",
                 "hits_memory", "hits_disk", "hits_peer", "misses", "puts", "refused", "damaged",
                 "evictions", "leases", "leases_expired", "clients")] + [("reserved", c.c_uint64 * 16)]


class Client:
    def __init__(self, library, socket):
        self.lib = c.CDLL(library)
        self.lib.kvloom_fingerprint.restype = Digest
        self.shape = Shape(2, LAYERS, HEADS, DIM, 0)
        self.options = Options(socket=socket.encode(), shape=self.shape,
                               fingerprint=self.lib.kvloom_fingerprint(b"kill", c.c_size_t(4)))
        self.client = c.c_void_p()
        self.error = Error()
        for _ in range(1000):
            if self.lib.kvloom_connect(c.byref(self.options), c.byref(self.client),
                                       c.byref(self.error)) == 0:
                return
            time.sleep(0.005)
        raise SystemExit(f"no connection: {self.error.text}")

    def key(self, number):
        n = 8 + number % 120
        tokens = (c.c_uint32 * n)(*[number * 1000 + i for i in range(n)])
        return Key(tokens=tokens, n_tokens=n), n

    @staticmethod
    def content(number, layer, n_tokens):
        return bytes([(number * 7 + layer * 3 + 1) % 256]) * (2 * HEADS * n_tokens * DIM * 2)

    def put(self, number):
        key, n = self.key(number)
        blocks = [self.content(number, layer, n) for layer in range(LAYERS)]
        layers = (c.c_char_p * LAYERS)(*blocks)
        return self.lib.kvloom_put(self.client, c.byref(key), layers, 0, c.byref(self.error))

    def get(self, number, deadline_ms=2000):
        """0: there and right; below 0: not there. A wrong byte ends the campaign."""
        key, n = self.key(number)
        size = LAYERS * 2 * HEADS * n * DIM * 2
        room = c.create_string_buffer(size)
        status = self.lib.kvloom_get_into(self.client, c.byref(key), deadline_ms, room,
                                          c.c_size_t(size), None, c.byref(self.error))
        if status == 0:
            wanted = b"".join(self.content(number, layer, n) for layer in range(LAYERS))
            assert room.raw == wanted, f"WRONG BYTES in segment {number}"
        return status

    def stats(self):
        stats = Stats()
        assert self.lib.kvloom_get_stats(self.client, c.byref(stats), c.byref(self.error)) == 0
        return stats


def load(library, socket, seed, acknowledged, failed):
    chance = random.Random(seed)
    client = Client(library, socket)
    while True:
        number = chance.randrange(NUMBERS)
        try:
            if chance.random() < 0.4:
                if client.put(number) == 0:
                    acknowledged[number] = 1
            else:
                client.get(number)
        except AssertionError as wrong:
            print(wrong, file=sys.stderr)
            failed.value = 1
            return


def resident_mib(pid):
    """Own and lent memory; pages of the database's map are the system's to take back."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file
                   if line.startswith(("RssAnon", "RssShmem"))) / 1024


def database_is_sound(program, place):
    """What doctor says of a database that nobody has open."""
    with open(place + "/config", "w", encoding="ascii") as file:
        file.write(f"model: kill\ntenants:\n  - name: default\n    socket: {place}/s.sock\n"
                   f"    key-file: {place}/key\n    store: {place}/store\n    memory: 8MiB\n"
                   "    disk: 64MiB\n")
    said = subprocess.run([program, "doctor", "--config", place + "/config"], capture_output=True,
                          text=True, check=False).stdout
    return any(line.startswith("ok    database") and "sound" in line for line in said.splitlines())


def start_sidecar(program, place):
    return subprocess.Popen([program, "sidecar", "--socket", place + "/s.sock", "--key-file",
                             place + "/key", "--model", "kill", "--store", place + "/store",
                             "--disk", "1GiB", "--memory", "8MiB"], stderr=subprocess.DEVNULL)


def main():
    build = os.path.abspath(sys.argv[1])
    n_kills = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else int(time.time())
    seconds = float(sys.argv[4]) if len(sys.argv) > 4 else float("inf")
    chance = random.Random(seed)
    program, library = os.path.join(build, "kvloom"), os.path.join(build, "libkvloom.so")
    place = tempfile.mkdtemp(prefix="kvloom-kill-")
    socket = place + "/s.sock"
    with open(place + "/key", "wb") as file:
        file.write(bytes(32))
    acknowledged = multiprocessing.Array("b", NUMBERS, lock=False)
    failed = multiprocessing.Value("b", 0, lock=False)

    def start_client(i):
        process = multiprocessing.Process(target=load, daemon=True,
                                          args=(library, socket, seed * 1000 + i, acknowledged, failed))
        process.start()
        return process

    sidecar = start_sidecar(program, place)
    watcher = Client(library, socket)
    clients = [start_client(i) for i in range(CLIENTS)]
    restarts, lost, checked, kills = [], 0, 0, 0
    end = time.monotonic() + seconds
    try:
        for kill in range(n_kills):
            if time.monotonic() > end:
                break
            kills += 1
            time.sleep(chance.random() * 0.1)
            if chance.random() < 0.3:
                victim = chance.randrange(CLIENTS)
                os.kill(clients[victim].pid, signal.SIGKILL)
                clients[victim].join()
                clients[victim] = start_client(CLIENTS + kill)
                continue
            sidecar.kill()
            sidecar.wait()
            known = [i for i in range(NUMBERS) if acknowledged[i]]
            begin = time.monotonic()
            sidecar = start_sidecar(program, place)
            while True:
                try:
                    watcher.stats()
                    break
                except AssertionError:
                    assert time.monotonic() - begin < 10, "it does not start again"
                    time.sleep(0.002)
            restarts.append(time.monotonic() - begin)
            for number in chance.sample(known, min(20, len(known))):
                checked += 1
                lost += watcher.get(number, 5000) != 0
            assert not failed.value
    finally:
        for client in clients:
            client.kill()
            client.join()
    for _ in range(100):
        stats = watcher.stats()
        if stats.clients == 1 and stats.leases == 0:
            break
        time.sleep(0.05)
    for number in range(NUMBERS):
        watcher.get(number, 5000)
    descriptors = len(os.listdir(f"/proc/{sidecar.pid}/fd"))
    resident = resident_mib(sidecar.pid)
    left = {"clients": int(stats.clients) - 1, "leases": int(stats.leases)}
    sidecar.terminate()
    status = sidecar.wait(timeout=10)
    sound = database_is_sound(program, place)
    files = sorted(os.listdir(place))
    shutil.rmtree(place)
    restarts.sort()
    print(json.dumps({"name": "kill", "seed": seed, "figures": {
        "kills": kills, "sidecar_kills": len(restarts), "acknowledged_checked": checked,
        "acknowledged_lost": lost, "restart_s_p50": round(restarts[len(restarts) // 2], 3) if restarts else 0,
        "restart_s_max": round(restarts[-1], 3) if restarts else 0,
        "damaged": int(stats.damaged), "leases_left": left["leases"],
        "clients_left": left["clients"], "descriptors_at_end": descriptors,
        "resident_mib_at_end": round(resident, 1), "database_sound": int(sound)}}))
    # 8 MiB of segments, each with a descriptor of its own, and the program's memory; the socket goes
    # with the sidecar, key, configuration and store stay.
    is_clean = files == ["config", "key", "store"] and descriptors < 1000 and resident < 48
    if not is_clean:
        print(f"left behind: {files}, {descriptors} descriptors, {resident:.0f} MiB", file=sys.stderr)
    return 0 if lost == 0 and not failed.value and status == 0 and sound and is_clean and \
        not any(left.values()) and (not restarts or restarts[-1] < 1) else 1


if __name__ == "__main__":
    sys.exit(main())
