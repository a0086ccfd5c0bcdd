#!/usr/bin/env python3
"""Logits and greedy answers against transformers in float32 on the same dequantised weights.

    python3 tests/golden/make_logits_golden.py [--kvloom build/release/kvloom] [--model NAME ...]
    python3 tests/golden/make_logits_golden.py --write        makes tests/golden/logits/*.json anew

tests/support/oracle.py makes the oracle's model from the GGUF file. Four texts of 1,000 tokens and
20 prompts are compared:

    max_difference   largest |difference| of any logit at any position
    wrong_top1       positions whose likeliest token differs although the oracle's two likeliest are
                     more than 1e-3 apart
    greedy_equal     prompts, of 20, whose 64 greedy tokens are all the same

Prints one JSON object; exits with 1 if a bound of the issue is broken (5e-3, 0, 20).
The golden files hold ids and a few of the oracle's logits; tests/integration/check_logits_golden.py
compares with them without torch.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
import peers  # noqa: E402

peers.run_again_under("transformers", ["torch", "transformers", "gguf", "numpy", "tokenizers"])

import numpy as np  # noqa: E402
import torch  # noqa: E402
from oracle import Source, load_model, load_tokenizer  # noqa: E402

N_TOKENS = 1000
N_GREEDY = 64
N_PROMPTS = 20
GAP = 1e-3  # two logits nearer than this are a tie: float32 rounding decides
DIFFERENCE_MAX = 5e-3
SAMPLE_EVERY = 25
TOP = 5

PROMPTS = [
    "What is the capital of Norway, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a C function that returns the larger of two integers.",
    "List the first ten prime numbers.",
    "Write a short poem about a bridge in the rain.",
    "What is 17 plus 25? Show how you got there.",
    "Name three uses of copper.",
    "How do I boil an egg so that the yolk stays soft?",
    "Give me a polite e-mail that cancels a meeting on Friday.",
    "What does a purifier do on board a ship?",
    "Write a Python loop that prints the numbers from 1 to 5.",
    "Who wrote the play Hamlet, and when?",
    "Describe a bus to somebody who has never seen one.",
    "What is the difference between weather and climate?",
    "Translate into French: The museum is closed on Mondays.",
    "Why do batteries lose capacity when they are hot?",
    "Write one sentence with the words oak, lamp and harbour.",
    "What should be in an incident report?",
    "How many days has February in a leap year, and why?",
    "Write a SQL query that counts the orders of each customer.",
    "What is an idempotency key?",
    "Give three reasons to take notes in a meeting.",
    "Explain what a mutex is to a ten year old child.",
    "What is the longest river of South America?",
    "Write a haiku about snow on a roof.",
    "What is the boiling point of water in degrees Fahrenheit?",
    "Suggest a name for a small bakery by the sea.",
    "What does HTTP status 404 mean?",
    "Write a JSON object that describes a book.",
    "How does a sailing ship sail against the wind?",
]


# --- the oracle's answers ---

def chat_ids(tokenizer, vocabulary, messages):
    """ChatML, as both models were trained on; ends where the assistant begins."""
    start, end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
    ids = []
    for role, content in messages:
        ids += [start, *tokenizer.encode(f"{role}\n{content}").ids, end]
        ids += tokenizer.encode("\n").ids
    return ids + [start, *tokenizer.encode("assistant\n").ids]


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def texts_of(tokenizer, vocabulary):
    """Four texts of N_TOKENS each: prose, source code, many scripts and numbers, a chat."""
    documents = [read("agents", "data", f"document-{i}.txt") for i in range(1, 7)]
    template = json.loads(read("agents", "data", "workflow.json"))["agents"][0]["template"]
    system, user = template.split("\n---\n")
    code = "".join(read("src", "base", name) for name in ("pool.c", "alloc.c", "file.c", "log.c"))
    mixed = read("tests", "golden", "texts", "mixed.txt")
    texts = {
        "prose": tokenizer.encode(documents[0] + "\n" + documents[1]).ids,
        "code": tokenizer.encode(code).ids,
        "mixed": tokenizer.encode(mixed + documents[4]).ids,
        "chat": chat_ids(tokenizer, vocabulary,
                         [("system", system), ("user", user + documents[3])]),
    }
    for name, ids in texts.items():
        assert len(ids) >= N_TOKENS, (name, len(ids))
    return {name: ids[:N_TOKENS] for name, ids in texts.items()}


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def greedy(model, ids, ends):
    """(tokens, smallest gap between the two likeliest on the way)"""
    tokens, smallest, past, given = [], float("inf"), None, ids
    with torch.no_grad():
        while len(tokens) < N_GREEDY:
            answer = model(torch.tensor([given]), past_key_values=past, use_cache=True,
                           logits_to_keep=1)
            past = answer.past_key_values
            top = torch.topk(answer.logits[0, -1], 2)
            smallest = min(smallest, float(top.values[0] - top.values[1]))
            token = int(top.indices[0])
            if token in ends:
                break
            tokens.append(token)
            given = [token]
    return tokens, smallest


def greedy_cases(model, tokenizer, vocabulary, ends):
    """The first N_PROMPTS prompts whose way stays clear of ties."""
    cases = []
    for prompt in PROMPTS:
        ids = chat_ids(tokenizer, vocabulary, [("user", prompt)])
        tokens, smallest = greedy(model, ids, ends)
        if smallest <= GAP:
            peers.say(f"  a tie of {smallest:.1e} on the way, left out: {prompt}")
            continue
        cases.append({"prompt": ids, "tokens": tokens, "gap": round(smallest, 5)})
        peers.say(f"  greedy {len(cases)}/{N_PROMPTS}")
        if len(cases) == N_PROMPTS:
            return cases
    raise SystemExit("too few prompts without ties: add some to PROMPTS")


# --- ours ---

def write_ids(folder, ids):
    path = os.path.join(folder, "ids")
    with open(path, "w", encoding="ascii") as file:
        file.writelines(f"{i}\n" for i in ids)
    return path


def our_logits(kvloom, model_path, ids, n_vocab, folder):
    out = os.path.join(folder, "logits")
    subprocess.run([kvloom, "logits", "--model", model_path, "--tokens-file",
                    write_ids(folder, ids), "--out", out], check=True)
    return np.fromfile(out, dtype="<f4").reshape(len(ids), n_vocab)


def our_greedy(kvloom, model_path, ids, folder, ends):
    answer = subprocess.run([kvloom, "generate", "--model", model_path, "--tokens-file",
                             write_ids(folder, ids), "--max-tokens", str(N_GREEDY), "--json"],
                            check=True, capture_output=True)
    return [token for token in json.loads(answer.stdout)["tokens"] if token not in ends]


def compare_text(name, theirs, ours):
    differences = np.abs(theirs - ours)
    top = np.sort(np.partition(theirs, -2, axis=1)[:, -2:], axis=1)
    clear = top[:, 1] - top[:, 0] > GAP
    differing = theirs.argmax(axis=1) != ours.argmax(axis=1)
    row = {"text": name, "max_difference": float(differences.max()),
           "mean_difference": float(differences.mean()),
           "wrong_top1": np.flatnonzero(clear & differing).tolist(),
           "ties": int((~clear).sum()), "differing_ties": int((~clear & differing).sum())}
    peers.say("  " + json.dumps(row))
    return row


# --- both ---

def golden_text(name, ids, logits):
    """What is kept of a text: its ids, the likeliest token of every position that is no tie, and
    the likeliest five with their logits at every 25th position."""
    gaps = np.sort(np.partition(logits, -2, axis=1)[:, -2:], axis=1)
    clear = gaps[:, 1] - gaps[:, 0] > GAP
    likeliest = logits.argmax(axis=1)
    top5 = []
    for position in range(SAMPLE_EVERY - 1, len(ids), SAMPLE_EVERY):
        order = np.argsort(-logits[position], kind="stable")[:TOP]
        top5.append({"position": position, "ids": order.tolist(),
                     "logits": [round(float(logits[position][i]), 5) for i in order]})
    return {"name": name, "ids": ids, "top5": top5,
            "top1": [int(t) if c else None for t, c in zip(likeliest, clear)]}


def write_golden(name, path, n_vocab, texts, cases):
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    out = os.path.join(HERE, "logits", name + ".json")
    with open(out, "w", encoding="ascii") as file:
        file.write("{" + f'"model": {json.dumps(name)}, "sha256": "{digest}", '
                   f'"n_vocab": {n_vocab}, "oracle": "transformers, torch float32",\n"texts": [\n')
        file.write(",\n".join(json.dumps(text, separators=(",", ":")) for text in texts))
        file.write('\n],\n"greedy": [\n')
        file.write(",\n".join(json.dumps(case, separators=(",", ":")) for case in cases))
        file.write("\n]}\n")
    peers.say(f"  wrote {out}")


def work(name, arguments, folder):
    path = peers.model_path(name)
    source = Source(path)
    tokenizer, vocabulary = load_tokenizer(source)
    ends = {source.key("tokenizer.ggml.eos_token_id"), vocabulary["<|im_end|>"],
            vocabulary["<|endoftext|>"]}
    peers.say(f"{name}: loading the oracle")
    model = load_model(source)
    golden, rows = [], []
    for text, ids in texts_of(tokenizer, vocabulary).items():
        theirs = logits_of(model, ids)
        golden.append(golden_text(text, ids, theirs))
        if arguments.kvloom:
            ours = our_logits(arguments.kvloom, path, ids, theirs.shape[1], folder)
            rows.append(compare_text(text, theirs, ours))
    cases = greedy_cases(model, tokenizer, vocabulary, ends)
    if arguments.write:
        write_golden(name, path, theirs.shape[1], golden, cases)
    if not arguments.kvloom:
        return {}
    equal = sum(our_greedy(arguments.kvloom, path, case["prompt"], folder, ends) == case["tokens"]
                for case in cases)
    return {"max_difference": max(row["max_difference"] for row in rows),
            "wrong_top1": sum(len(row["wrong_top1"]) for row in rows),
            "greedy_equal": equal, "texts": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kvloom", help="compare this program")
    parser.add_argument("--model", nargs="+", choices=sorted(peers.MODELS),
                        default=sorted(peers.MODELS))
    parser.add_argument("--write", action="store_true", help="make the golden files anew")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if not arguments.write and not arguments.kvloom:
        arguments.kvloom = os.path.join(ROOT, "build", "release", "kvloom")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        report = {name: work(name, arguments, folder) for name in arguments.model}
    print(json.dumps(report, indent=2))
    good = all(not found or (found["max_difference"] <= DIFFERENCE_MAX
                             and found["wrong_top1"] == 0 and found["greedy_equal"] == N_PROMPTS)
               for found in report.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
