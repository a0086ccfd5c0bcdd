"""`compare.py batch`: one file of rows with two-level sharing, through `kvloom batch` in its own order,
through the same program in the file's order with the prefix tree as an LRU cache, and through
llama.cpp's server with its prompt cache and SLOTS requests at once, alternately.

An instruction for all rows, DOCUMENTS for QUESTIONS rows each, shuffled. Pages are as many as hold
two fifths of the documents, as a larger file would find it: nothing is measured where everything
fits. Rates are rows per second, the model's loading apart."""
import concurrent.futures
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
import batch_rows  # noqa: E402
import compare_serve  # noqa: E402
import peers  # noqa: E402

QUESTIONS, INSTRUCTION_WORDS, DOCUMENT_WORDS, MAX_TOKENS = 10, 150, 350, 16
SLOTS = 16
TOKENS_A_ROW = 900  # at most
PAGE_TOKENS = 16


def run_ours(arguments, model, source, order, n_pages):
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [arguments.kvloom, "batch", "--model", model, "--threads", str(arguments.threads),
             "--order", order, "--pages", str(n_pages), "--json", source,
             os.path.join(folder, "out")], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"kvloom batch: status {done.returncode}")
        figures = json.loads(done.stdout)["figures"]
        return figures["answered"] / figures["seconds"], figures


def run_theirs(server, made):
    def ask(row):
        connection = http.client.HTTPConnection(server.host, server.port, timeout=3600)
        connection.request("POST", "/v1/chat/completions",
                           json.dumps({**row[1], "cache_prompt": True}),
                           {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        if answer.status != 200:
            raise SystemExit(f"{server.name}: status {answer.status}")

    server.wake()
    try:
        start = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(SLOTS) as pool:
            list(pool.map(ask, made))
        return len(made) / (time.monotonic() - start)
    finally:
        server.rest()


def run(arguments, model, machine):
    documents = (60 if arguments.quick else 1000) // QUESTIONS
    rounds = 1 if arguments.quick else min(arguments.rounds, 2)
    rates, details = {}, {}
    made = batch_rows.rows(documents, QUESTIONS, INSTRUCTION_WORDS, DOCUMENT_WORDS, MAX_TOKENS)
    n_pages = max(TOKENS_A_ROW * (documents * 2 // 5 + 1) // PAGE_TOKENS, 128)
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "in.jsonl")
        batch_rows.write(source, made)
        for number in range(rounds):
            # A server of its own for each round: its cache would know the rows from the last.
            theirs = compare_serve.start_llamacpp(arguments, model, SLOTS, TOKENS_A_ROW)
            try:
                for name in ("plan", "file", "llamacpp"):
                    if name == "llamacpp":
                        rate = run_theirs(theirs, made)
                    else:
                        rate, details[name] = run_ours(arguments, model, source, name, n_pages)
                    rates.setdefault(name, []).append(rate)
                    peers.say(f"batch of {len(made)}, round {number + 1}: {name} {rate:.2f} rows/s")
            finally:
                theirs.end()
    ours = statistics.median(rates["plan"])
    figures = {"batch_vs_lru": round(ours / statistics.median(rates["file"]), 3),
               "batch_vs_llamacpp": round(ours / statistics.median(rates["llamacpp"]), 3)}
    return {"name": "batch", "figures": figures, "machine": machine, "model": arguments.model,
            "pages": n_pages, "kvloom": details,
            "rows": [{"engine": name, "rows": len(made), "rows_per_s": [round(r, 3) for r in all_]}
                     for name, all_ in rates.items()]}
