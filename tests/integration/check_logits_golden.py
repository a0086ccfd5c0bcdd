#!/usr/bin/env python3
"""`kvloom logits` and `kvloom generate` against the golden files of tests/golden/logits, which hold
a few of transformers' float32 logits. Needs nothing but Python's own library.

    python3 tests/integration/check_logits_golden.py build/release

A model that is not in the cache is left out, and said to be; without any, the exit status is 77."""
import array
import glob
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import peers  # noqa: E402

DIFFERENCE_MAX = 5e-3
FLOAT_BYTES = 4


def write_ids(folder, ids):
    path = os.path.join(folder, "ids")
    with open(path, "w", encoding="ascii") as file:
        file.writelines(f"{i}\n" for i in ids)
    return path


def check_text(kvloom, model, text, n_vocab, folder):
    """Findings of one text, and the largest difference."""
    out = os.path.join(folder, "logits")
    subprocess.run([kvloom, "logits", "--model", model, "--tokens-file",
                    write_ids(folder, text["ids"]), "--out", out], check=True)
    wanted_bytes = len(text["ids"]) * n_vocab * FLOAT_BYTES
    if os.path.getsize(out) != wanted_bytes:
        return [f"{os.path.getsize(out)} bytes of logits, should be {wanted_bytes}"], 0.0
    findings, largest = [], 0.0
    samples = {sample["position"]: sample for sample in text["top5"]}
    with open(out, "rb") as file:
        for position, wanted in enumerate(text["top1"]):
            row = array.array("f")
            row.frombytes(file.read(n_vocab * FLOAT_BYTES))
            if sys.byteorder != "little":
                row.byteswap()
            if wanted is not None:
                likeliest = row.index(max(row))
                if likeliest != wanted:
                    findings.append(f"position {position}: {likeliest} is likeliest, not {wanted}")
            for token, logit in zip(samples.get(position, {}).get("ids", []),
                                    samples.get(position, {}).get("logits", [])):
                largest = max(largest, abs(row[token] - logit))
                # Written so that a logit that is not a number is a finding too.
                if not abs(row[token] - logit) <= DIFFERENCE_MAX:
                    findings.append(f"position {position}, token {token}: logit {row[token]:.5f}, "
                                    f"should be {logit:.5f}")
    os.remove(out)
    return findings, largest


def check_greedy(kvloom, model, cases, folder):
    findings = []
    for number, case in enumerate(cases):
        answer = subprocess.run(
            [kvloom, "generate", "--model", model, "--tokens-file",
             write_ids(folder, case["prompt"]), "--max-tokens", "64", "--json"],
            check=True, capture_output=True)
        tokens = json.loads(answer.stdout)["tokens"]
        # An answer that ended may or may not list the token that ended it.
        if len(tokens) == len(case["tokens"]) + 1 and len(tokens) < 64:
            tokens = tokens[:-1]
        if tokens != case["tokens"]:
            equal = 0
            while equal < min(len(tokens), len(case["tokens"])) and \
                    tokens[equal] == case["tokens"][equal]:
                equal += 1
            findings.append(f"prompt {number}: differs from token {equal} on")
    return findings


def main():
    kvloom = os.path.abspath(os.path.join(sys.argv[1] if len(sys.argv) > 1 else "build/release",
                                          "kvloom"))
    n_checked, n_findings = 0, 0
    for path in sorted(glob.glob(os.path.join(os.path.dirname(HERE), "golden", "logits", "*.json"))):
        with open(path, encoding="ascii") as file:
            golden = json.load(file)
        model = peers.model_path(golden["model"])
        if not os.path.exists(model):
            print(f"{golden['model']}: not in the cache, left out")
            continue
        with tempfile.TemporaryDirectory() as folder:
            for text in golden["texts"]:
                findings, largest = check_text(kvloom, model, text, golden["n_vocab"], folder)
                print(f"{golden['model']}: {text['name']}: largest difference {largest:.1e}, "
                      f"{len(findings)} findings", flush=True)
                n_findings += len(findings)
                for finding in findings[:10]:
                    print("    " + finding)
            findings = check_greedy(kvloom, model, golden["greedy"], folder)
            print(f"{golden['model']}: greedy: {len(golden['greedy']) - len(findings)} of "
                  f"{len(golden['greedy'])} prompts equal", flush=True)
            n_findings += len(findings)
            for finding in findings:
                print("    " + finding)
        n_checked += 1
    if n_checked == 0:
        print("no model, nothing checked")
        return 77
    return 1 if n_findings else 0


if __name__ == "__main__":
    sys.exit(main())
