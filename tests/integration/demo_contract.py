#!/usr/bin/env python3
"""`kvloom demo --json`: its keys, its sums, and what must never happen.

    python3 tests/integration/demo_contract.py build/release

Three agents, from a folder that is not the clone. Speed is not judged here: a test may run on a
busy machine. Exit status 77 where the model is not in the cache."""
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
import contract  # noqa: E402

MODEL = "smollm2-135m"
AGENTS = 3
TOP_KEYS = {"agents", "rounds", "reuse_rate", "speedup_mean", "speedup_last", "top1_agreement", "kl",
            "wrong_exact_tokens"}
AGENT_KEYS = {"name", "prompt_tokens", "shared", "placed", "offset", "blended", "computed",
              "fetched_bytes", "ttft_full_ms", "ttft_reuse_ms", "speedup", "top1_agreement", "kl"}


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


def demo(kvloom, folder, quality, rounds):
    done = subprocess.run(
        [kvloom, "demo", "--model", MODEL, "--agents", str(AGENTS), "--rounds", str(rounds),
         "--max-tokens", "24", "--quality", quality, "--data", os.path.join(ROOT, "agents", "data"),
         "--json", "--report", os.path.join(folder, "report.html")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=folder, check=False, timeout=600)
    assert done.returncode == 0, f"status {done.returncode}"
    with open(os.path.join(folder, "report.html"), encoding="utf-8") as file:
        page = file.read()
    # Self-contained: nothing is loaded from elsewhere.
    assert len(page) > 1000 and "src=\"http" not in page and "href=\"http" not in page
    report = json.loads(done.stdout)
    check_shape(report)
    return report


def check_balanced(kvloom, folder):
    """What an earlier agent has read or written is reused by the later ones, over the wire."""
    report = demo(kvloom, folder, "balanced", 3)
    assert report["reuse_rate"] > 0.5, report["reuse_rate"]
    last = report["agents"][-1]
    assert last["computed"] < last["prompt_tokens"] / 2, last
    assert sum(agent["fetched_bytes"] for agent in report["agents"][1:]) > 0, "nothing was fetched"


def check_exact(kvloom, folder):
    """One word turns approximation off: nothing is placed, and the answers are full prefill's."""
    for agent in demo(kvloom, folder, "exact", 2)["agents"]:
        assert agent["placed"] == agent["offset"] == agent["blended"] == 0, agent
        assert agent["top1_agreement"] == 1 and agent["kl"] < 1e-6, agent


def main():
    contract.need_model(MODEL)
    checks = contract.Checks()
    for check in (check_balanced, check_exact):
        checks.run_in_folder(check, contract.program())
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
