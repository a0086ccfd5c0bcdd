#!/usr/bin/env python3
"""KVLoom and its peers alternately, in one session on one machine.

    python3 tests/bench/compare.py prefill decode --json [--quick] [--model smollm2-135m]
    python3 tests/bench/compare.py serve --json            (by itself: compare_serve.py)
    python3 tests/bench/compare.py batch --json            (by itself: compare_batch.py)

Same GGUF file, same number of threads. A round measures ours once and each peer once; a peer's
process is stopped (SIGSTOP) while another runs. Figures are ratios of median tokens per second,
ours over theirs: above 1 is better for us. Peers are installed into environments of their own
under $XDG_CACHE_HOME/kvloom/peers the first time. One JSON object goes to standard output, progress
to standard error. --quick takes less than a minute on a quiet machine and gives the same keys;
--peers-only measures no KVLoom and gives no figures, only rows."""
import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
import compare_batch  # noqa: E402
import compare_serve  # noqa: E402
import peers  # noqa: E402

# name: (kind, tokens, peer), in the order they are measured
FIGURES = {
    "prefill": [("prefill_512_vs_llamacpp", "prefill", 512, "llamacpp"),
                ("prefill_1024_vs_llamacpp", "prefill", 1024, "llamacpp"),
                ("prefill_1024_vs_transformers", "prefill", 1024, "transformers")],
    "decode": [("decode_512_vs_llamacpp", "decode", 512, "llamacpp"),
               ("decode_2048_vs_llamacpp", "decode", 2048, "llamacpp")],
}
# Measured over whole servers, with programs of their own.
ALONE = {"serve": compare_serve.run, "batch": compare_batch.run}
IMPORTS = {"llamacpp": ["xllamacpp"],
           "transformers": ["torch", "transformers", "gguf", "numpy", "tokenizers"]}
DECODED = 32  # tokens of one decode measurement, as in the peers' programs


class Peer:
    """A peer's process, which keeps its model loaded and is stopped while others are measured."""

    def __init__(self, name, model, threads):
        self.name = name
        peers.say(f"{name}: starting")
        self.process = subprocess.Popen(
            [peers.python_of(name, IMPORTS[name]), os.path.join(HERE, f"peer_{name}.py"), model,
             str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True)
        self.about = self.answer()
        self.process.send_signal(signal.SIGSTOP)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with status {self.process.wait()}")
        return json.loads(line)

    def tokens_per_s(self, kind, n_tokens):
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"kind": kind, "tokens": n_tokens}) + "\n")
            self.process.stdin.flush()
            return (n_tokens if kind == "prefill" else DECODED) / self.answer()
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def end(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Ours:
    """`kvloom bench`, which warms up by itself and gives the median of its repetitions."""

    def __init__(self, kvloom, model, threads, repeats):
        self.command = [kvloom, "bench", "--model", model, "--threads", str(threads), "--json",
                        "--repeats", str(repeats)]
        self.limits = []
        self.about = {}

    def tokens_per_s(self, kind, n_tokens):
        done = subprocess.run([*self.command, "--tokens", str(n_tokens), kind],
                              stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(self.command)}: status {done.returncode}")
        report = json.loads(done.stdout)
        self.about = {"version": report["version"], "machine": report["machine"]}
        self.limits.append({name: round(value, 3) for name, value in report["figures"].items()
                            if not name.endswith("tokens_per_s")} | {"kind": kind,
                                                                     "tokens": n_tokens})
        return report["figures"][f"{kind}_tokens_per_s"]


def describe_machine(threads):
    about = {"cores": os.cpu_count(), "threads": threads, "system": platform.platform(),
             "load_at_start": os.getloadavg()[0]}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return about
    lines = dict(line.split(":", 1) for line in text.replace("\t", "").split("\n") if ":" in line)
    flags = set(lines.get("flags", "").split())
    about["cpu"] = lines.get("model name", "").strip()
    about["instructions"] = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16",
                                               "amx_int8") if name in flags]
    return about


def measure(rounds, figures, engines):
    """{(kind, tokens, engine): [tokens per second, ...]}, engines in turn within a round."""
    cases = {}
    for _, kind, n_tokens, peer in figures:
        cases.setdefault((kind, n_tokens), []).append(peer)
    seen = {}
    for kind, n_tokens in cases:
        names = [name for name in ("kvloom", *cases[kind, n_tokens]) if name in engines]
        for number in range(rounds):
            for name in names:
                rate = engines[name].tokens_per_s(kind, n_tokens)
                seen.setdefault((kind, n_tokens, name), []).append(rate)
                peers.say(f"{kind} {n_tokens}, round {number + 1}/{rounds}: {name} "
                          f"{rate:.1f} tokens/s")
    return seen


def report_of(arguments, figures, seen, engines, machine):
    rows = [{"kind": kind, "tokens": n_tokens, "engine": name,
             "tokens_per_s": round(statistics.median(rates), 2),
             "all": [round(rate, 2) for rate in rates]}
            for (kind, n_tokens, name), rates in seen.items()]
    ratios = {}
    for name, kind, n_tokens, peer in figures:
        if "kvloom" in engines:
            ratios[name] = round(statistics.median(seen[kind, n_tokens, "kvloom"]) /
                                 statistics.median(seen[kind, n_tokens, peer]), 3)
    machine["load_at_end"] = os.getloadavg()[0]
    ours = engines.get("kvloom")
    return {"name": " ".join(arguments.names), "figures": ratios, "rows": rows,
            "limits": ours.limits if ours else [], "machine": machine,
            "engines": {name: engine.about for name, engine in engines.items()},
            "model": arguments.model, "version": ours.about["version"] if ours else None}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", choices=[*sorted(FIGURES), *ALONE],
                        metavar="prefill|decode|serve|batch")
    parser.add_argument("--json", action="store_true", help="one JSON object (it is always one)")
    parser.add_argument("--quick", action="store_true", help="one round, under a minute")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m", choices=sorted(peers.MODELS))
    parser.add_argument("--kvloom", default=os.path.join(ROOT, "build", "release", "kvloom"))
    parser.add_argument("--peers-only", action="store_true")
    arguments = parser.parse_args()
    model = peers.model_path(arguments.model)
    if not os.path.exists(model):
        raise SystemExit(f"{model} is not there; fetch it with: kvloom model pull {arguments.model}")
    if len(arguments.names) > 1 and set(arguments.names) & set(ALONE):
        parser.error("serve and batch are measured by themselves")
    figures = [figure for name in dict.fromkeys(arguments.names)
               for figure in FIGURES.get(name, [])]
    machine = describe_machine(arguments.threads)
    if machine["load_at_start"] > 0.5:
        peers.say(f"load is {machine['load_at_start']:.1f}: other programs run, and the ratios are "
                  "worth little")
    # Ended by a time limit, peers must be ended too: a stopped process would stay for ever.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if arguments.names[0] in ALONE:
        print(json.dumps(ALONE[arguments.names[0]](arguments, model, machine), indent=2))
        return 0
    engines = {}
    try:
        for name in dict.fromkeys(figure[3] for figure in figures):
            engines[name] = Peer(name, model, arguments.threads)
        if not arguments.peers_only:
            engines["kvloom"] = Ours(arguments.kvloom, model, arguments.threads,
                                     1 if arguments.quick else 3)
        seen = measure(1 if arguments.quick else arguments.rounds, figures, engines)
        report = report_of(arguments, figures, seen, engines, machine)
    finally:
        for engine in engines.values():
            if isinstance(engine, Peer):
                engine.end()
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
