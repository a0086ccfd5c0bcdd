#!/usr/bin/env python3
"""`kvloom demo --json`: its keys, its sums, and what must never happen.

    python3 tests/integration/demo_contract.py build/release

Three agents, from a folder that is not the clone. Speed is not judged here: a test may run on a
busy machine. Exit status 77 where the model is not in the cache."""
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
import peers  # noqa: E402

MODEL = "smollm2-135m"
AGENTS = 3
TOP_KEYS = {"agents", "rounds", "reuse_rate", "speedup_mean", "speedup_last", "top1_agreement", "kl",
            "wrong_exact_tokens"}
AGENT_KEYS = {"name", "prompt_tokens", "shared", "placed", "offset", "blended", "computed",
              "fetched_bytes", "ttft_full_ms", "ttft_reuse_ms", "speedup", "top1_agreement", "kl"}


def demo(kvloom, folder, quality, rounds):
    done = subprocess.run(
        [kvloom, "demo", "--model", MODEL, "--agents", str(AGENTS), "--rounds", str(rounds),
         "--max-tokens", "24", "--quality", quality, "--data", os.path.join(ROOT, "agents", "data"),
         "--json", "--report", os.path.join(folder, "report.html")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=folder, check=False, timeout=600)
    assert done.returncode == 0, f"status {done.returncode}"
    return json.loads(done.stdout)


def check_shape(report):
    assert not TOP_KEYS - set(report), f"missing: {TOP_KEYS - set(report)}"
    assert len(report["agents"]) == AGENTS
    for agent in report["agents"]:
        assert not AGENT_KEYS - set(agent), f"missing: {AGENT_KEYS - set(agent)}"
        parts = sum(agent[key] for key in ("shared", "placed", "offset", "blended", "computed"))
        assert abs(parts - agent["prompt_tokens"]) < 0.5, f"{agent['name']}: parts add up to {parts}"
        assert agent["ttft_full_ms"] > 0 and agent["ttft_reuse_ms"] > 0
        assert 0 <= agent["top1_agreement"] <= 1 and agent["kl"] >= -1e-6
    assert report["wrong_exact_tokens"] == 0, "an exact run gave other tokens"


def check_balanced(report):
    """What an earlier agent has read or written is reused by the later ones, over the wire."""
    check_shape(report)
    assert report["reuse_rate"] > 0.5, report["reuse_rate"]
    last = report["agents"][-1]
    assert last["computed"] < last["prompt_tokens"] / 2, last
    assert sum(agent["fetched_bytes"] for agent in report["agents"][1:]) > 0, "nothing was fetched"


def check_exact(report):
    """One word turns approximation off: nothing is placed, and the answers are full prefill's."""
    check_shape(report)
    for agent in report["agents"]:
        assert agent["placed"] == agent["offset"] == agent["blended"] == 0, agent
        assert agent["top1_agreement"] == 1 and agent["kl"] < 1e-6, agent


def main():
    kvloom = os.path.abspath(os.path.join(sys.argv[1] if len(sys.argv) > 1 else "build/release",
                                          "kvloom"))
    if not os.path.exists(peers.model_path(MODEL)):
        print(f"{MODEL} is not in the cache: fetch it with kvloom model pull {MODEL}")
        return 77
    n_failed = 0
    for quality, rounds, check in (("balanced", 3, check_balanced), ("exact", 2, check_exact)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(demo(kvloom, folder, quality, rounds))
                page = os.path.join(folder, "report.html")
                assert os.path.getsize(page) > 1000, "no report"
                with open(page, encoding="utf-8") as file:
                    text = file.read()
                # Self-contained: nothing is loaded from elsewhere.
                assert "src=\"http" not in text and "href=\"http" not in text
                print(f"{quality}: as promised", flush=True)
            except AssertionError as error:
                n_failed += 1
                print(f"{quality}: {error or 'an assertion failed'}", flush=True)
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
