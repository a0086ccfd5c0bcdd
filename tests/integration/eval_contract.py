#!/usr/bin/env python3
"""`kvloom eval reuse --quick --json`: its keys, and what must hold for every prompt.

    python3 tests/integration/eval_contract.py build/release

How well a policy does is not judged here: one prompt of each scenario says nothing about that.
Exit status 77 where the model is not in the cache."""
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
import contract  # noqa: E402

MODEL = "smollm2-135m"
FIGURES = {"em_balanced", "em_fast", "em_verified", "read_full", "read_balanced",
           "acc_pooled_balanced", "acc_pooled_cacheblend15", "kl_balanced_open",
           "kl_balanced_agents", "top1_balanced_agents", "recomputed_balanced"}


def check_eval_reuse():
    done = subprocess.run(
        [contract.program(), "eval", "reuse", "--quick", "--json", "--model", MODEL,
         "--scenarios", "needle3,edited6,read6,agents5"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=900, check=False)
    assert done.returncode == 0, f"status {done.returncode}"
    report = json.loads(done.stdout)
    assert report["name"] == "reuse"
    assert not FIGURES - set(report["figures"]), FIGURES - set(report["figures"])
    # Approximation is a head start, never the last word.
    assert report["figures"]["em_verified"] == 1, report["figures"]
    assert 0.1 < report["figures"]["recomputed_balanced"] <= 0.16, report["figures"]
    rows = {(row["scenario"], row["policy"]): row for row in report["rows"]}
    for (scenario, policy), row in rows.items():
        if policy == "verified":
            assert row["kl"] < 1e-6 and row["top1_agreement"] == 1, row
        if policy == "none":
            assert row["recomputed"] == 0, row
            # Something was approximated at all, or nothing is tested here.
            assert row["kl"] > 1e-4, row
        if policy == "full":
            assert row["kl"] == 0 and row["exact_match"] == 1 and row["ttft_ratio"] == 1, row
        if policy == "all":
            # Everything computed again in order is a full prefill, whatever was placed.
            assert row["recomputed"] == 1 and row["exact_match"] == 1 and row["kl"] < 1e-6, row
        if policy not in ("full", "all", "verified", "gate"):
            assert row["recomputed"] <= 0.31, row
    assert len(rows) == len(report["rows"]) >= 35


def few_rows(*arguments):
    """KL by policy of one prompt of three chunks."""
    done = subprocess.run(
        [contract.program(), "eval", "reuse", "--json", "--model", MODEL, "-n", "1", "--scenarios",
         "needle3", "--policies", "none,sink8", *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=600, check=False)
    assert done.returncode == 0, f"status {done.returncode}"
    return {row["policy"]: row["kl"] for row in json.loads(done.stdout)["rows"]}


def check_donors_and_corrections():
    """Prompts before the evaluated one leave donors, or a mean; a correction without data changes
    nothing, one with data does."""
    at_home = few_rows("--correct", "mean,probe")
    assert set(at_home) == {"full", "none", "none+mean", "none+probe", "sink8", "sink8+mean",
                            "sink8+probe"}, at_home
    assert at_home["none+probe"] == at_home["none"], at_home
    assert len(set(at_home.values())) == 6, at_home
    donors = few_rows("--home", "donor", "--correct", "mean")
    # A mean is of KV at home: there is none to move.
    assert donors["none+mean"] == donors["none"] != at_home["none"], (donors, at_home)


def main():
    contract.need_model(MODEL)
    checks = contract.Checks()
    checks.run(check_eval_reuse)
    checks.run(check_donors_and_corrections)
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
