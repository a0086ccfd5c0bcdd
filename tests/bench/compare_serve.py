"""`compare.py serve`: our HTTP server and llama.cpp's, the same client, alternately.

Sessions at once, each a prompt of PREFIX tokens that all share and SUFFIX of its own, answers of
ANSWER tokens. The prefix is warm on both sides (each has a prompt cache); the suffixes are new in
every round. A rate is all answers' tokens over the time from the first request to the last answer."""
import concurrent.futures
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
import peers  # noqa: E402

PREFIX, SUFFIX, ANSWER = 1024, 32, 64
CASES = {"32": 32, "single": 1}
FIGURES = {"tokens_vs_llamacpp_32": "32", "single_vs_llamacpp": "single"}


class Server:
    """A server's process, which is stopped while the other is measured."""

    def __init__(self, name, command, address_of):
        self.name = name
        peers.say(f"{name}: starting")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{name}: ended with status {self.process.wait()}")
        self.host, port = address_of(line).replace("http://", "").strip().rsplit(":", 1)
        self.port = int(port)
        self.rest()

    def rest(self):
        self.process.send_signal(signal.SIGSTOP)

    def wake(self):
        self.process.send_signal(signal.SIGCONT)

    def complete(self, ids):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=3600)
        body = {"prompt": ids, "max_tokens": ANSWER, "n_predict": ANSWER, "temperature": 0,
                "ignore_eos": True, "cache_prompt": True}
        connection.request("POST", "/v1/completions", json.dumps(body),
                           {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if answer.status != 200:
            raise SystemExit(f"{self.name}: {answer.status} {data[:300]}")
        return json.loads(data)["usage"]["completion_tokens"]

    def tokens_per_s(self, prompts):
        self.wake()
        try:
            start = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
                counts = list(pool.map(self.complete, prompts))
            seconds = time.monotonic() - start
        finally:
            self.rest()
        if min(counts) < ANSWER - 1:
            raise SystemExit(f"{self.name}: answers of {counts} tokens, {ANSWER} were asked for")
        return sum(counts) / seconds

    def end(self):
        self.wake()
        self.process.terminate()
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start_llamacpp(arguments, model, slots, context):
    return Server("llamacpp",
                  [peers.python_of("llamacpp", ["xllamacpp"]),
                   os.path.join(HERE, "peer_llamacpp_server.py"), model, str(arguments.threads),
                   str(slots), str(context)],
                  lambda line: json.loads(line)["address"])


def start_servers(arguments, model, slots):
    ours = Server("kvloom",
                  [arguments.kvloom, "serve", "--model", model, "--threads", str(arguments.threads),
                   "--http", "127.0.0.1:0", "--answers", str(slots)],
                  lambda line: line[len("listening at "):])
    try:
        return [ours, start_llamacpp(arguments, model, slots, PREFIX + SUFFIX + ANSWER + 64)]
    except BaseException:
        ours.end()
        raise


def measure(arguments, model):
    """{(case, server): [tokens per second, ...]}"""
    seen = {}
    chance = random.Random(11)
    prefix = [chance.randrange(100, 40000) for _ in range(PREFIX)]
    for case, sessions in CASES.items():
        servers = start_servers(arguments, model, sessions)
        try:
            for number in range(-1, 1 if arguments.quick else arguments.rounds):
                prompts = [prefix + [chance.randrange(100, 40000) for _ in range(SUFFIX)]
                           for _ in range(sessions)]
                for server in servers:
                    rate = server.tokens_per_s(prompts)
                    peers.say(f"{case}, round {number + 1}: {server.name} {rate:.1f} tokens/s"
                              + (" (warming up, not counted)" if number < 0 else ""))
                    if number >= 0:
                        seen.setdefault((case, server.name), []).append(rate)
        finally:
            for server in servers:
                server.end()
    return seen


def run(arguments, model, machine):
    seen = measure(arguments, model)
    figures = {name: round(statistics.median(seen[case, "kvloom"])
                           / statistics.median(seen[case, "llamacpp"]), 3)
               for name, case in FIGURES.items()}
    rows = [{"sessions": CASES[case], "engine": name, "prefix": PREFIX, "suffix": SUFFIX,
             "answer": ANSWER, "tokens_per_s": round(statistics.median(rates), 2),
             "all": [round(rate, 2) for rate in rates]}
            for (case, name), rates in seen.items()]
    return {"name": "serve", "figures": figures, "rows": rows, "machine": machine,
            "model": arguments.model}
