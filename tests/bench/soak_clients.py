"""Many clients on one sidecar, mixed sizes: python3 tests/bench/soak_clients.py BUILD [CLIENTS] [SECONDS] [SEED] [TRACE]

1,000 clients (or as many as are named) put and get in random turns for 60 seconds (the acceptance runs 600). Every
byte is compared. With TRACE, `kvloom trace record` follows what they ask into that file. Prints one JSON object: the
latencies of gets from memory, the sidecar's memory against its cap, its resident memory, descriptors and leases
before and after.
"""
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

from kill_campaign import Client, NUMBERS, start_sidecar


def resident_mib(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return int(next(line for line in file if line.startswith("VmRSS")).split()[1]) / 1024


def main():
    build = os.path.abspath(sys.argv[1])
    n_clients = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 60
    seed = int(sys.argv[4]) if len(sys.argv) > 4 else int(time.time())
    trace = sys.argv[5] if len(sys.argv) > 5 else None
    recorder = None
    chance = random.Random(seed)
    place = tempfile.mkdtemp(prefix="kvloom-soak-")
    with open(place + "/key", "wb") as file:
        file.write(bytes(32))
    sidecar = start_sidecar(os.path.join(build, "kvloom"), place)
    socket, library = place + "/s.sock", os.path.join(build, "libkvloom.so")
    try:
        watcher = Client(library, socket)
        watcher.put(0)
        watcher.get(0)
        before = len(os.listdir(f"/proc/{sidecar.pid}/fd"))
        clients = [Client(library, socket) for _ in range(n_clients)]
        if trace:
            recorder = subprocess.Popen([os.path.join(build, "kvloom"), "trace", "record", "--socket",
                                         socket, "--model", "kill", trace])
            while watcher.stats().clients < n_clients + 2:
                time.sleep(0.01)
        expected = n_clients + 1 + (1 if trace else 0)
        got, missed, most, resident = [], 0, 0, 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for client in chance.sample(clients, n_clients):
                number = min(int(chance.paretovariate(0.5)) - 1, NUMBERS - 1)
                begin = time.perf_counter()
                if client.get(number, 0) == 0:
                    got.append(time.perf_counter() - begin)
                    continue
                missed += 1
                if client.get(number) != 0:
                    client.put(number)
            stats = watcher.stats()
            most = max(most, stats.memory_bytes)
            resident = max(resident, resident_mib(sidecar.pid))
            assert stats.memory_bytes <= stats.memory_bytes_max, "memory above its cap"
            assert stats.clients == expected, stats.clients
        if recorder:
            recorder.terminate()
            recorder.wait()
        for client in clients:
            client.lib.kvloom_close(client.client)
        for _ in range(200):
            stats = watcher.stats()
            if stats.clients == 1 and stats.leases == 0:
                break
            time.sleep(0.05)
        after = len(os.listdir(f"/proc/{sidecar.pid}/fd"))
        got.sort()
        print(json.dumps({"name": "soak", "seed": seed, "figures": {
            "clients": n_clients, "seconds": seconds, "gets": len(got), "misses": missed,
            "get_us_p50": round(got[len(got) // 2] * 1e6, 1),
            "get_us_p99": round(got[len(got) * 99 // 100] * 1e6, 1),
            "memory_of_cap": round(most / stats.memory_bytes_max, 3),
            "resident_mib_max": round(resident, 1), "descriptors_before": before,
            "descriptors_after": after, "clients_left": int(stats.clients) - 1,
            "leases_left": int(stats.leases)}}))
        # What is in memory may hold a descriptor each; clients' own must all be gone.
        return 0 if stats.clients == 1 and stats.leases == 0 and after - before < NUMBERS else 1
    finally:
        sidecar.kill()
        sidecar.wait()
        shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main())
